from typing import NamedTuple

import pytest

from llama32.engine.request import Request
from llama32.engine.scheduler import ScheduledStep, Scheduler
from llama32.engine.speculation import Speculator, accept, group_by_position
from tests.engine.fakes import PAGE, FakeDrafts, make_prompt


class FakeToken(NamedTuple):
    request: Request
    id: int


def make_request(length: int = 10, new: int = 500) -> Request:
    return Request(prompt=make_prompt(length), max_length=length + new)


def say(request: Request, *ids: int) -> list[FakeToken]:
    return [FakeToken(request, id) for id in ids]


@pytest.mark.parametrize(
    ("drafts", "sampled", "valid"),
    [
        ([], [5], [5]),
        ([5], [5, 6], [5, 6]),
        ([5], [4, 6], [4]),
        ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]),
        ([5, 6, 7], [5, 6, 0, 8], [5, 6, 0]),
        ([5, 6, 7], [5, 0, 7, 8], [5, 0]),
        ([5, 6, 7], [0, 6, 7, 8], [0]),
    ],
)
def test_what_was_drawn_is_valid_up_to_the_first_that_was_not_drafted(drafts, sampled, valid):
    assert [token.id for token in accept(drafts, say(make_request(), *sampled))] == valid


def test_turns_are_all_first_tokens_then_all_second_ones():
    one, two, three = (make_request() for _ in range(3))
    tokens = [*say(one, 1, 2, 3), *say(two, 4), *say(three, 5, 6)]
    first, second, third = group_by_position(tokens)
    assert first == [*say(one, 1), *say(two, 4), *say(three, 5)]
    assert second == [*say(one, 2), *say(three, 6)]
    assert third == say(one, 3)


def test_of_nothing_there_is_one_turn():
    assert group_by_position([]) == [[]]


# How much is drafted.


def make_speculator(
    quality: float = 1.0, num_tokens: int = 4, num_pages: int = 32
) -> tuple[Speculator, Scheduler, FakeDrafts]:
    drafts = FakeDrafts(quality, num_tokens)
    speculator = Speculator(drafts, num_tokens)
    return speculator, Scheduler(num_pages, PAGE, on_release=speculator.release), drafts


def run(
    speculator: Speculator, scheduler: Scheduler, num_accepted: int | None = None
) -> ScheduledStep:
    """Run a step in which `num_accepted` drafts, or all drafts, are accepted."""
    step = speculator.add_drafts(scheduler.schedule(), scheduler)
    scheduler.advance(step)
    rights = {
        request: min(len(request.drafts), 99 if num_accepted is None else num_accepted)
        for request, _, stop in step.decode
        if stop >= request.length
    }
    speculator.update(rights)
    for request, count in rights.items():
        for token in [*request.drafts[:count], 7]:
            request.append(token)
    return step


def test_a_step_gets_rows_for_drafts():
    speculator, scheduler, drafts = make_speculator()
    first, second = make_request(10), make_request(1)
    scheduler.add(first)
    scheduler.add(second)
    assert run(speculator, scheduler) == ([(first, 0, 9)], [(first, 9, 14), (second, 0, 5)])
    assert drafts.requested == [4, 4]
    assert run(speculator, scheduler) == ([], [(first, 14, 19), (second, 5, 10)])


def test_nothing_is_drafted_while_a_prompt_is_read_or_an_answer_replayed():
    speculator, scheduler, drafts = make_speculator()
    request = make_request(600, new=1000)
    request.output = [1] * 700
    scheduler.add(request)
    assert run(speculator, scheduler) == ([(request, 0, 512)], [])
    assert run(speculator, scheduler) == ([(request, 512, 599)], [(request, 599, 1025)])
    assert drafts.requested == []
    assert run(speculator, scheduler) == ([], [(request, 1025, 1304)])
    assert drafts.requested == [4]


def test_a_drafter_may_have_fewer_or_no_ideas():
    speculator, scheduler, drafts = make_speculator()
    requests = [make_request(1), make_request(1), make_request(1)]
    for request in requests:
        scheduler.add(request)
    drafts.propose = lambda limits: {requests[0]: [5], requests[1]: []}
    step = run(speculator, scheduler)
    assert step.decode == [(requests[0], 0, 2), (requests[1], 0, 1), (requests[2], 0, 1)]


def test_more_than_was_asked_for_is_not_taken():
    speculator, scheduler, drafts = make_speculator()
    request = make_request(1, new=3)
    scheduler.add(request)
    drafts.propose = lambda limits: {request: [5] * 9}
    assert run(speculator, scheduler).decode == [(request, 0, 3)]


def test_drafts_of_which_none_is_right_are_halved_and_then_rarely_tried():
    speculator, scheduler, drafts = make_speculator(num_tokens=8)
    scheduler.add(make_request(1))
    for _ in range(40):
        run(speculator, scheduler, num_accepted=0)
    assert drafts.requested == [8, 4, 2, 1, 1, 1, 1, 1]


def test_drafts_that_are_all_right_grow_by_one_up_to_the_most():
    speculator, scheduler, drafts = make_speculator(num_tokens=4)
    scheduler.add(make_request(1))
    for _ in range(2):
        run(speculator, scheduler, num_accepted=0)
    for _ in range(5):
        run(speculator, scheduler)
    assert drafts.requested == [4, 2, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("num_accepted", "limits"), [(1, [4, 2, 2]), (2, [4, 4, 4]), (3, [4, 4, 4])]
)
def test_drafts_of_which_half_are_right_stay_as_many(num_accepted, limits):
    speculator, scheduler, drafts = make_speculator(num_tokens=4)
    scheduler.add(make_request(1))
    for _ in range(3):
        run(speculator, scheduler, num_accepted=num_accepted)
    assert drafts.requested == limits


def test_a_drafter_without_an_idea_is_asked_as_before():
    speculator, scheduler, drafts = make_speculator(num_tokens=4)
    scheduler.add(make_request(1))
    run(speculator, scheduler, num_accepted=0)
    guess, drafts._guess = drafts._guess, lambda request, n: []
    for _ in range(50):
        run(speculator, scheduler)
    drafts._guess = guess
    run(speculator, scheduler)
    assert drafts.requested == [4] + [2] * 51


def test_how_many_are_worth_it_is_found_for_each_request_by_itself():
    speculator, scheduler, drafts = make_speculator(num_tokens=4)
    good, bad = make_request(1), make_request(2)
    scheduler.add(good)
    scheduler.add(bad)
    drafts.propose = lambda limits: (
        seen.append(dict(limits)) or {r: [7] * n for r, n in limits.items()}
    )
    seen: list[dict[Request, int]] = []
    for _ in range(3):
        step = speculator.add_drafts(scheduler.schedule(), scheduler)
        scheduler.advance(step)
        speculator.update({good: len(good.drafts), bad: 0})
        for request in (good, bad):
            request.append(7)
    assert seen == [{good: 4, bad: 4}, {good: 4, bad: 2}, {good: 4, bad: 1}]


def test_of_a_request_that_has_ended_nothing_is_kept():
    speculator, scheduler, drafts = make_speculator()
    request = make_request(1)
    scheduler.add(request)
    run(speculator, scheduler)
    assert drafts.tracked == {request}
    assert speculator._draft_lengths
    scheduler.finish(request)
    assert not drafts.tracked
    assert not speculator._draft_lengths
