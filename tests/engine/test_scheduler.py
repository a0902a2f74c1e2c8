from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

import pytest

from llama32.engine.prefix_cache import PageKey
from llama32.engine.request import Request
from llama32.engine.scheduler import ScheduledStep, Scheduler

FRESH = count(1000)  # first tokens that no other prompt has


def make_scheduler(num_pages: int = 32, prefill_tokens: int = 16, **options) -> Scheduler:
    return Scheduler(num_pages, 8, prefill_tokens=prefill_tokens, alignment=4, **options)


def make_request(length: int, new: int = 4, like: Request | None = None) -> Request:
    """Return a request with a new prompt, or with the beginning of `like`'s prompt."""
    prompt = [next(FRESH), *range(1, length)] if like is None else [*like.prompt[:length]]
    prompt += range(500, 500 + length - len(prompt))
    return Request(prompt=prompt, max_length=length + new)


def add(scheduler: Scheduler, *lengths: int, new: int = 4) -> list[Request]:
    requests = [make_request(length, new) for length in lengths]
    for request in requests:
        scheduler.add(request)
    return requests


def complete(scheduler: Scheduler, step: ScheduledStep) -> ScheduledStep:
    """Complete a step with a model that always generates 7."""
    scheduler.advance(step)
    for request, _, stop in step.decode:
        if stop == request.length:
            request.output.append(7)
            if request.length == request.max_length:
                scheduler.finish(request)
    return step


def run(scheduler: Scheduler, steps: int = 1) -> ScheduledStep:
    for _ in range(steps - 1):
        complete(scheduler, scheduler.schedule())
    return complete(scheduler, scheduler.schedule())


def run_to_the_end(scheduler: Scheduler) -> list[ScheduledStep]:
    steps = []
    while scheduler.running or scheduler.waiting:
        steps.append(run(scheduler))
        assert len(steps) < 1000
    assert scheduler.pages.num_referenced == 0
    return steps


@pytest.mark.parametrize(
    ("page_size", "prefill_tokens"), [(8, 3), (6, 16), (2, 16)], ids=["budget", "page", "small"]
)
def test_sizes_that_are_not_aligned_are_refused(page_size, prefill_tokens):
    with pytest.raises(ValueError, match=rf"\({prefill_tokens}\).* 4, .*\({page_size}\)"):
        Scheduler(4, page_size, prefill_tokens=prefill_tokens, alignment=4)


def test_there_is_nothing_to_do_without_requests():
    scheduler = make_scheduler()
    assert scheduler.schedule() == ([], [])
    add(scheduler, 5)
    run_to_the_end(scheduler)
    assert scheduler.schedule() == ([], [])


def test_a_prompt_that_is_read_gets_its_first_token_in_the_same_step():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 9)
    assert run(scheduler) == ([(request, 0, 8)], [(request, 8, 9)])
    assert run(scheduler) == ([], [(request, 9, 10)])


def test_a_prompt_of_one_token_is_only_decoded():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 1)
    assert run(scheduler) == ([], [(request, 0, 1)])


@pytest.mark.parametrize("length", range(1, 60))
def test_all_tokens_are_computed_once_and_the_last_of_the_prompt_is_decoded(length):
    scheduler = make_scheduler(prefill_tokens=13)
    (request,) = add(scheduler, length, new=3)
    steps = run_to_the_end(scheduler)
    prefill = [chunk for step in steps for chunk in step.prefill]
    decode = [chunk for step in steps for chunk in step.decode]
    assert [n for _, *cut in prefill for n in range(*cut)] == list(range(length - 1))
    assert [n for _, *cut in decode for n in range(*cut)] == [length - 1, length, length + 1]
    assert request.output == [7] * 3


def test_everyone_whose_prompt_is_read_gets_a_token_in_every_step():
    scheduler = make_scheduler(prefill_tokens=4)
    short = add(scheduler, 1, 3, 2, new=20)
    run(scheduler, 2)
    (long,) = add(scheduler, 50)
    for _ in range(12):
        before = [len(request.output) for request in short]
        step = run(scheduler)
        assert [chunk.request for chunk in step.prefill] == [long]
        assert [len(request.output) for request in short] == [n + 1 for n in before]


def test_prompts_are_cut_at_the_alignment_and_no_step_exceeds_the_budget():
    scheduler = make_scheduler(prefill_tokens=18)
    first, second = add(scheduler, 22, 40)
    assert run(scheduler) == ([(first, 0, 16)], [])
    assert run(scheduler) == ([(first, 16, 21), (second, 0, 12)], [(first, 21, 22)])
    assert run(scheduler) == ([(second, 12, 28)], [(first, 22, 23)])
    assert run(scheduler) == ([(second, 28, 39)], [(first, 23, 24), (second, 39, 40)])


def test_the_oldest_prompt_is_read_first():
    scheduler = make_scheduler()
    first, second, third = add(scheduler, 33, 17, 17)
    assert run(scheduler).prefill == [(first, 0, 16)]
    assert run(scheduler).prefill == [(first, 16, 32)]
    assert run(scheduler).prefill == [(second, 0, 16)]
    assert run(scheduler).prefill == [(third, 0, 16)]


def test_the_end_of_a_short_prompt_fills_what_is_left_of_the_budget():
    scheduler = make_scheduler(prefill_tokens=18)
    long, short = add(scheduler, 40, 3)
    assert run(scheduler) == ([(long, 0, 16), (short, 0, 2)], [(short, 2, 3)])


def test_requests_start_in_the_order_they_came_in():
    scheduler = make_scheduler(num_pages=8)
    first, large, small = add(scheduler, 8, 56, 1, new=8)
    run(scheduler)
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [large, small]
    run(scheduler, 8)
    assert scheduler.running[0] is large


def test_no_more_run_at_once_than_may():
    scheduler = make_scheduler(max_running=2)
    requests = add(scheduler, 1, 1, 1, 1, 1)
    run(scheduler)
    assert scheduler.running == requests[:2]
    assert max(len(step.decode) for step in run_to_the_end(scheduler)) == 2
    assert all(len(request.output) == 4 for request in requests)


@pytest.mark.parametrize(("num_pages", "start"), [(3, 2), (4, 2), (5, 3), (6, 3), (7, 4)])
def test_a_start_reserves_a_page_for_each_running_request(num_pages, start):
    scheduler = make_scheduler(num_pages)
    add(scheduler, *[1] * 9)
    scheduler.schedule()
    assert len(scheduler.running) == start
    assert scheduler.pages.num_available >= start - 1


@pytest.mark.parametrize(("num_pages", "starts"), [(3, False), (4, True)])
def test_the_reserved_page_is_besides_the_page_for_the_next_token(num_pages, starts):
    scheduler = make_scheduler(num_pages)
    (first,) = add(scheduler, 8, new=16)
    run(scheduler)
    (second,) = add(scheduler, 1)
    scheduler.schedule()
    assert len(first.pages) == 2
    assert (second in scheduler.running) == starts


def test_the_pages_of_a_request_are_as_many_as_its_tokens_need():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 16, new=9)
    for length in range(16, 25):
        scheduler.schedule()
        assert len(request.pages) == -(-length // 8)
        run(scheduler)
    assert request.pages == []
    assert scheduler.pages.num_referenced == 0


def test_a_request_has_its_pages_in_a_row_where_there_is_room():
    scheduler = make_scheduler(num_pages=64)
    requests = add(scheduler, 20, 20, 20, new=30)
    while scheduler.waiting or scheduler.running:
        run(scheduler)
        for request in requests:
            first = request.pages[0] if request.pages else 0
            assert request.pages == list(range(first, first + len(request.pages)))


def test_a_prompt_that_was_computed_before_is_not_computed_again():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 20)
    run(scheduler, 2)
    pages = list(first.pages)
    second = make_request(20, like=first)
    scheduler.add(second)
    step = run(scheduler)
    assert step.prefill == [(second, 16, 19)]
    assert second.num_cached == 16
    assert second.pages[:2] == pages[:2]
    assert second.pages[2] != pages[2]
    assert [scheduler.pages.ref_counts[page] for page in (*pages, second.pages[2])] == [2, 2, 1, 1]
    run_to_the_end(scheduler)
    third = make_request(20, like=first)
    scheduler.add(third)
    run(scheduler)
    assert third.num_cached == 16
    assert third.pages == pages
    assert first.num_cached == 0


def test_the_last_prompt_token_is_computed_even_where_all_is_known():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 17)
    run_to_the_end(scheduler)
    for length, known in ((17, 16), (16, 8), (9, 8), (8, 0)):
        again = make_request(length, like=first)
        scheduler.add(again)
        assert run(scheduler).decode == [(again, length - 1, length)]
        assert again.num_cached == known
        run_to_the_end(scheduler)


def test_a_page_is_shared_when_it_is_full_and_not_before():
    scheduler = make_scheduler(prefill_tokens=4)
    (first,) = add(scheduler, 20)
    again = make_request(20, like=first)
    for known in (0, 1, 1, 2):
        run(scheduler)
        assert len(scheduler.prefix_cache) == known
    scheduler.add(again)
    run(scheduler)
    assert again.num_cached == 16


def test_tokens_of_an_answer_are_not_shared():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 9, new=20)
    run_to_the_end(scheduler)
    second = Request(prompt=[*first.prompt, *first.output], max_length=40)
    scheduler.add(second)
    run(scheduler)
    assert second.num_cached == 8


def test_a_request_whose_pages_are_about_to_be_computed_waits_and_then_shares_all():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 33)
    others = [make_request(33, like=first), make_request(40, like=first)]
    for request in others:
        scheduler.add(request)
    assert run(scheduler) == ([(first, 0, 16)], [])
    assert run(scheduler) == ([(first, 16, 32)], [(first, 32, 33)])
    step = run(scheduler)
    assert [request.num_cached for request in others] == [32, 32]
    assert step.prefill == [(others[1], 32, 39)]
    assert [scheduler.pages.ref_counts[page] for page in first.pages[:4]] == [3] * 4


def test_a_request_waits_only_for_pages_it_shares():
    scheduler = make_scheduler(prefill_tokens=8)
    (first,) = add(scheduler, 33)
    second = Request(prompt=[*first.prompt[:8], *range(200, 220)], max_length=40)
    scheduler.add(second)
    run(scheduler)
    assert scheduler.running == [first]
    run(scheduler)
    assert scheduler.running == [first, second]
    assert second.num_cached == 8


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_who_waits_for_pages_of_another_goes_on_at_once_when_that_one_ends(steps):
    scheduler = make_scheduler(prefill_tokens=8)
    (first,) = add(scheduler, 33)
    second, third = (make_request(33, like=first) for _ in range(2))
    scheduler.add(second)
    scheduler.add(third)
    run(scheduler, steps)
    scheduler.finish(first)
    step = run(scheduler)
    assert step.prefill == [(second, 8 * steps, 8 * steps + 8)]
    assert second.num_cached == 8 * steps
    assert list(scheduler.waiting) == [third]
    run_to_the_end(scheduler)
    assert third.num_cached == 32


def make_crowded(prefill_tokens: int = 16) -> tuple[Scheduler, list[Request]]:
    """Return three running requests that soon need more pages than available."""
    scheduler = make_scheduler(6, prefill_tokens)
    requests = add(scheduler, 8, 8, 8, new=24)
    run(scheduler)
    assert scheduler.running == requests
    return scheduler, requests


def test_the_youngest_is_preempted_and_returns_to_the_head_of_the_queue():
    scheduler, (first, second, third) = make_crowded()
    (late,) = add(scheduler, 1)
    while third in scheduler.running:
        run(scheduler)
    assert scheduler.running == [first, second]
    assert list(scheduler.waiting) == [third, late]
    assert (third.num_preemptions, third.num_computed, third.pages) == (1, 0, [])
    assert scheduler.num_preemptions == 1
    assert len(third.output) > 1


def test_preempted_requests_keep_their_order_and_the_oldest_is_never_preempted():
    scheduler, requests = make_crowded()
    requests += add(scheduler, 1, 8)
    most = 0
    while scheduler.running or scheduler.waiting:
        run(scheduler)
        alive = [request for request in requests if request.length < request.max_length]
        assert [*scheduler.running, *scheduler.waiting] == alive
        most = max(most, sum(request.num_preemptions > 0 for request in scheduler.waiting))
    assert most == 2
    assert requests[0].num_preemptions == 0
    assert all(request.length == request.max_length for request in requests)


def test_a_preempted_request_prefills_the_prompt_and_replays_its_output_as_rows():
    scheduler, (first, second, third) = make_crowded()
    while third in scheduler.running:
        run(scheduler)
    num_output = len(third.output)
    scheduler.finish(first)
    scheduler.finish(second)
    assert run(scheduler) == ([(third, 0, 7)], [(third, 7, 8 + num_output)])
    assert len(third.output) == num_output + 1
    assert run(scheduler) == ([], [(third, 8 + num_output, 9 + num_output)])


def test_a_replay_is_spread_over_steps_within_the_budget():
    scheduler, (first, second, third) = make_crowded(prefill_tokens=8)
    while third in scheduler.running:
        run(scheduler)
    num_output = len(third.output)
    assert num_output == 7
    scheduler.finish(first)
    scheduler.finish(second)
    assert run(scheduler) == ([(third, 0, 7)], [(third, 7, 9)])
    assert len(third.output) == num_output
    (late,) = add(scheduler, 8)
    assert run(scheduler) == ([], [(third, 9, 15)])
    assert len(third.output) == num_output + 1
    assert run(scheduler) == ([(late, 0, 7)], [(third, 15, 16), (late, 7, 8)])


def test_what_a_replay_takes_of_the_budget_is_not_there_for_prompts():
    scheduler, (first, second, third) = make_crowded()
    while third in scheduler.running:
        run(scheduler)
    num_output = len(third.output)
    scheduler.finish(first)
    scheduler.finish(second)
    (late,) = add(scheduler, 8)
    assert run(scheduler) == ([(third, 0, 7)], [(third, 7, 8 + num_output)])
    assert scheduler.running == [third, late]


def test_a_request_preempted_during_prefill_does_not_wait_for_itself():
    scheduler = make_scheduler(8, prefill_tokens=4)
    (old,) = add(scheduler, 8, new=12)
    (young,) = add(scheduler, 41)
    same = make_request(41, like=young)
    scheduler.add(same)
    while not young.num_preemptions:
        run(scheduler)
    assert 0 < len(old.output) < 12
    scheduler.finish(old)
    scheduler.schedule()
    assert scheduler.running == [young]
    assert young.num_computed == 32
    assert list(scheduler.waiting) == [same]
    run_to_the_end(scheduler)
    assert len(young.output) == len(same.output) == 4


def test_a_preempted_request_finds_its_own_prompt_which_does_not_count_as_cached():
    scheduler = make_scheduler(8)
    old, young = add(scheduler, 8, 20, new=30)
    while not young.num_preemptions:
        run(scheduler)
    scheduler.finish(old)
    assert run(scheduler).prefill == [(young, 16, 19)]
    assert young.num_cached == 0


def test_a_request_larger_than_the_cache_is_refused_with_the_numbers():
    scheduler = make_scheduler(num_pages=4)
    match = r"33 tokens \(29 of prompt\), 5 pages of 8, and the KV cache has 4 in all: ask"
    with pytest.raises(ValueError, match=match):
        scheduler.add(make_request(29))
    assert not scheduler.waiting
    assert scheduler.schedule() == ([], [])


def test_a_request_as_large_as_the_cache_runs_alone():
    scheduler = make_scheduler(num_pages=4)
    requests = add(scheduler, 28, 28, 1)
    run(scheduler)
    assert scheduler.running == requests[:1]
    run_to_the_end(scheduler)
    assert [request.num_preemptions for request in requests[:2]] == [0, 0]
    assert all(request.output == [7] * 4 for request in requests)


def test_a_waiting_request_that_is_over_is_out_of_the_queue():
    scheduler = make_scheduler(max_running=1)
    running, waiting, last = add(scheduler, 5, 5, 5)
    run(scheduler)
    scheduler.finish(waiting)
    assert list(scheduler.waiting) == [last]
    assert scheduler.running == [running]
    run_to_the_end(scheduler)
    assert waiting.output == []
    assert len(last.output) == 4


def test_the_pages_of_a_running_request_that_is_over_are_free_at_once():
    scheduler = make_scheduler()
    first, second = add(scheduler, 30, 30)
    scheduler.schedule()
    assert scheduler.pages.num_referenced == 8
    scheduler.finish(first)
    assert scheduler.pages.num_referenced == 4
    assert first.pages == []
    assert scheduler.running == [second]


def test_pages_that_others_share_stay_when_a_request_is_over():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 20)
    run(scheduler, 2)
    second = make_request(20, like=first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.finish(first)
    assert [scheduler.pages.ref_counts[page] for page in second.pages] == [1, 1, 1]
    assert scheduler.pages.num_referenced == 3


def test_what_is_over_can_be_finished_again():
    scheduler = make_scheduler()
    first, second = add(scheduler, 5, 5)
    scheduler.schedule()
    for _ in range(2):
        scheduler.finish(first)
    scheduler.finish(make_request(5))
    assert scheduler.running == [second]
    assert scheduler.pages.num_referenced == 1


def test_of_evictable_pages_the_ends_of_prompts_are_evicted_first():
    scheduler = make_scheduler(num_pages=6)
    (first,) = add(scheduler, 33)
    run_to_the_end(scheduler)
    add(scheduler, 28)
    run_to_the_end(scheduler)
    again = make_request(33, like=first)
    scheduler.add(again)
    run(scheduler)
    assert again.num_cached == 16


def test_pages_found_in_the_cache_are_not_evicted_for_the_rest_of_the_same_prompt():
    scheduler = make_scheduler(num_pages=4)
    (first,) = add(scheduler, 17)
    run_to_the_end(scheduler)
    add(scheduler, 9)
    run_to_the_end(scheduler)
    again = make_request(28, like=first)
    scheduler.add(again)
    run(scheduler)
    assert again.num_cached == 16
    assert len(set(again.pages)) == 4


def test_evictable_pages_of_a_hit_are_not_counted_as_available():
    scheduler = make_scheduler(num_pages=4)
    (first,) = add(scheduler, 17)
    run_to_the_end(scheduler)
    (running,) = add(scheduler, 5)
    run(scheduler)
    again = make_request(17, like=first)
    scheduler.add(again)
    run(scheduler)
    assert scheduler.running == [running]
    run(scheduler, 3)
    assert scheduler.running == [again]


def test_cleared_prefixes_are_computed_again():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 20)
    run_to_the_end(scheduler)
    scheduler.clear_prefix_cache()
    assert scheduler.pages.num_free == 32
    again = make_request(20, like=first)
    scheduler.add(again)
    run_to_the_end(scheduler)
    assert again.num_cached == 0


def test_running_requests_keep_their_pages_when_the_prefix_cache_is_cleared():
    scheduler = make_scheduler()
    (first,) = add(scheduler, 20)
    run(scheduler, 2)
    pages = list(first.pages)
    scheduler.clear_prefix_cache()
    assert first.pages == pages
    assert scheduler.pages.num_referenced == 3
    again = make_request(20, like=first)
    scheduler.add(again)
    run(scheduler)
    assert again.num_cached == 0
    assert not set(again.pages) & set(pages)
    run_to_the_end(scheduler)
    assert scheduler.pages.num_free == 30


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_page_begun_before_the_prefix_cache_was_cleared_is_shared(steps):
    scheduler = make_scheduler(prefill_tokens=4)
    (first,) = add(scheduler, 20)
    run(scheduler, steps)
    scheduler.clear_prefix_cache()
    run_to_the_end(scheduler)
    again = make_request(20, like=first)
    scheduler.add(again)
    run_to_the_end(scheduler)
    assert again.num_cached == 0
    assert len(again.output) == 4


def test_no_request_waits_for_pages_begun_before_the_prefix_cache_was_cleared():
    scheduler = make_scheduler(prefill_tokens=4)
    (first,) = add(scheduler, 20)
    again = make_request(20, like=first)
    scheduler.add(again)
    run(scheduler)
    assert scheduler.running == [first]
    scheduler.clear_prefix_cache()
    run(scheduler)
    assert scheduler.running == [first, again]
    run_to_the_end(scheduler)


def test_a_step_that_failed_is_planned_again():
    scheduler, (_, _, third) = make_crowded()
    add(scheduler, 40, 1)
    seen = set()
    for _ in range(100):
        step = scheduler.schedule()
        pages = [list(request.pages) for request in scheduler.running]
        assert scheduler.schedule() == step
        assert [request.pages for request in scheduler.running] == pages
        seen |= {"prefill" if step.prefill else "decode", third.num_preemptions}
        complete(scheduler, step)
    assert {"prefill", "decode", 0, 1} <= seen


def test_only_advance_moves_a_request_on():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 20)
    step = scheduler.schedule()
    assert request.num_computed == 0
    assert len(scheduler.prefix_cache) == 0
    scheduler.advance(step)
    assert request.num_computed == 16
    assert len(scheduler.prefix_cache) == 2


class Queue(OrderedDict):
    """Counts the requests read by iteration."""

    read = 0

    def __iter__(self) -> Iterator[Request]:
        for request in super().__iter__():
            self.read += 1
            yield request

    def __reversed__(self):
        raise AssertionError("the queue is read from its head")

    keys = values = items = __reversed__


@pytest.mark.parametrize("waiting", [1, 1000])
def test_a_step_reads_no_more_of_the_queue_than_it_starts(waiting):
    scheduler = make_scheduler(max_running=3)
    queue = scheduler.waiting = Queue()
    requests = add(scheduler, 1, *[1] * waiting)
    for _ in range(6):
        queue.read = 0
        before = len(queue)
        step = scheduler.schedule()
        assert queue.read <= before - len(queue) + 1
        complete(scheduler, step)
    queue.read = 0
    scheduler.finish(requests[-1])
    assert queue.read == 0


def test_nobody_reads_what_another_with_the_same_digest_computed_nor_waits_for_it_forever():
    scheduler = make_scheduler()
    first, second = add(scheduler, 20, 20, new=30)
    third = make_request(20, 30, like=second)
    scheduler.add(third)
    for request in (first, second, third):
        request.keys = [PageKey(i, key.tokens) for i, key in enumerate(request.keys)]
    run(scheduler, 10)
    assert scheduler.running == [first, second, third]
    run_to_the_end(scheduler)
    assert (second.num_cached, third.num_cached) == (0, 0)


def test_who_ends_lets_others_wait_on_for_pages_with_the_same_digest():
    scheduler = make_scheduler(prefill_tokens=4)
    first, second = add(scheduler, 20, 20, new=30)
    third = make_request(20, like=second)
    scheduler.add(third)
    for request in (first, second, third):
        request.keys = [PageKey(i, key.tokens) for i, key in enumerate(request.keys)]
    run(scheduler, 6)
    assert scheduler.running == [first, second]
    scheduler.finish(first)
    run(scheduler)
    assert scheduler.running == [second]


# Drafts.


def draft(
    scheduler: Scheduler, step: ScheduledStep, num_drafts: int, num_right: int = 0
) -> tuple[ScheduledStep, list[int]]:
    """Return the step with as many drafts as fit, the first correct, and the numbers."""
    rooms = []
    for request, _, stop in step.decode:
        if stop == request.length:
            rooms.append(scheduler.reserve_drafts(request, num_drafts))
            request.drafts = ([7] * num_right + [8] * num_drafts)[: rooms[-1]]
    decode = [chunk._replace(stop=chunk.stop + len(chunk.request.drafts)) for chunk in step.decode]
    return step._replace(decode=decode), rooms


def complete_drafts(scheduler: Scheduler, step: ScheduledStep) -> None:
    """Like `complete`, with the tokens of correct drafts."""
    scheduler.advance(step)
    for request, _, stop in step.decode:
        if stop >= request.length:
            num_right = request.drafts.count(7)
            for _ in range(num_right + 1):
                request.append(7)
            if request.length == request.max_length:
                scheduler.finish(request)


def run_with_drafts(scheduler: Scheduler, num_drafts: int, num_right: int = 0) -> list[int]:
    step, rooms = draft(scheduler, scheduler.schedule(), num_drafts, num_right)
    complete_drafts(scheduler, step)
    return rooms


def test_drafts_of_a_request_go_into_its_pages_and_into_free_ones_behind():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 5, new=30)
    step = scheduler.schedule()
    pages = list(request.pages)
    assert scheduler.reserve_drafts(request, 3) == 3
    assert request.pages == pages
    assert scheduler.reserve_drafts(request, 4) == 4
    assert request.pages == [pages[0], pages[0] + 1]
    assert scheduler.reserve_drafts(request, 25) == 25
    assert len(request.pages) == 4
    assert scheduler.schedule() == step
    assert request.pages == pages


def test_no_more_is_drafted_than_may_still_come_besides_the_next_token():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 5, new=4)
    assert run_with_drafts(scheduler, 9) == [3]
    assert run_with_drafts(scheduler, 9, num_right=1) == [2]
    assert run_with_drafts(scheduler, 9) == [0]
    assert request.output == [7] * 4


def test_of_drafts_only_those_that_were_right_are_computed():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 5, new=30)
    for num_drafts, num_right, length in ((4, 0, 6), (4, 2, 9), (4, 4, 14), (0, 0, 15)):
        run_with_drafts(scheduler, num_drafts, num_right)
        assert (request.length, request.num_computed) == (length, length - 1)
    assert scheduler.schedule() == ([], [(request, 14, 15)])


def test_before_it_is_known_whether_drafts_are_right_none_is_computed():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 5, new=30)
    step, rooms = draft(scheduler, scheduler.schedule(), 4)
    scheduler.advance(step)
    assert rooms == [4]
    assert request.num_computed == request.length == 5


def test_drafts_are_not_shared():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 7, new=30)
    for _ in range(6):
        run_with_drafts(scheduler, 9, num_right=2)
    assert request.length > 16
    assert len(scheduler.prefix_cache) == 0


def test_cached_pages_are_not_evicted_for_drafts():
    scheduler = make_scheduler(num_pages=4)
    (first,) = add(scheduler, 17)
    run_to_the_end(scheduler)
    assert (scheduler.pages.num_free, scheduler.pages.num_available) == (2, 4)
    add(scheduler, 5, new=27)
    assert run_with_drafts(scheduler, 20) == [11]
    assert len(scheduler.prefix_cache) == 2
    again = make_request(15, like=first)
    scheduler.add(again)
    scheduler.schedule()
    assert again.num_cached == 8


def test_without_a_free_page_drafts_end_with_the_last_page():
    scheduler = make_scheduler(num_pages=2)
    add(scheduler, 5, new=9)
    scheduler.pages.allocate(1)
    assert [run_with_drafts(scheduler, 6) for _ in range(4)] == [[3], [2], [1], [0]]


@pytest.mark.parametrize("how", ["finish", "preempt"])
def test_pages_for_drafts_are_released_with_the_others(how):
    scheduler = make_scheduler()
    (request,) = add(scheduler, 5, new=30)
    draft(scheduler, scheduler.schedule(), 9)
    assert scheduler.pages.num_referenced == 2
    scheduler.finish(request) if how == "finish" else scheduler._preempt(request)
    assert scheduler.pages.num_referenced == 0
    assert list(request.drafts) == []


def test_a_request_preempted_with_drafts_starts_again_without():
    scheduler = make_scheduler()
    (request,) = add(scheduler, 5, new=30)
    run_with_drafts(scheduler, 4, num_right=2)
    draft(scheduler, scheduler.schedule(), 4)
    scheduler._preempt(request)
    assert scheduler.schedule() == ([(request, 0, 4)], [(request, 4, 8)])


def test_a_replay_can_have_drafts_behind_it_where_it_ends():
    scheduler, (first, second, third) = make_crowded(prefill_tokens=8)
    while third in scheduler.running:
        run(scheduler)
    scheduler.finish(first)
    scheduler.finish(second)
    assert run_with_drafts(scheduler, 3) == []
    step, rooms = draft(scheduler, scheduler.schedule(), 3, num_right=3)
    assert step == ([], [(third, 9, 18)])
    assert rooms == [3]
    complete_drafts(scheduler, step)
    assert (third.length, third.num_computed) == (19, 18)


def test_a_step_with_drafts_that_failed_is_planned_again_without_them():
    scheduler = make_scheduler()
    add(scheduler, 5, 13, new=20)
    run(scheduler, 2)
    step = scheduler.schedule()
    before = scheduler.pages.num_referenced
    drafted, _ = draft(scheduler, step, 9)
    assert drafted != step
    assert scheduler.pages.num_referenced > before
    assert scheduler.schedule() == step
    assert scheduler.pages.num_referenced == before


@pytest.mark.parametrize("num_pages", [6, 7, 9])
def test_wrong_drafts_change_nothing_of_who_runs_when(num_pages):
    """No request starts later, is preempted earlier, or finds less in the cache."""
    histories = []
    for num_drafts in (0, 5, 30):
        scheduler = make_scheduler(num_pages)
        names: dict[Request, int] = {}
        history, rooms = [], []
        for i in range(150):
            if i % 7 == 0:
                request = Request(prompt=[i // 14, *range(i % 19)], max_length=1 + i % 19 + 20)
                scheduler.add(request)
                names[request] = i
            step = scheduler.schedule()
            history.append(
                (
                    [(names[request], *cut) for chunk in step for request, *cut in chunk],
                    [(names[request], len(request.pages)) for request in scheduler.running],
                    [names[request] for request in scheduler.waiting],
                    scheduler.num_preemptions,
                )
            )
            drafted, step_rooms = draft(scheduler, step, num_drafts)
            rooms += step_rooms
            complete_drafts(scheduler, drafted)
        assert (max(rooms) > 5) == (num_drafts > 5)
        assert scheduler.num_preemptions > 0
        assert len(scheduler.prefix_cache) > 0
        histories.append(history)
    assert histories[1] == histories[0]
    assert histories[2] == histories[0]


def test_on_release_is_called_for_every_request_that_loses_its_pages():
    released = []
    scheduler = make_scheduler(6, on_release=released.append)
    first, second, third = add(scheduler, 8, 8, 8, new=24)
    (waiting,) = add(scheduler, 1)
    scheduler.schedule()
    scheduler.finish(waiting)
    assert released == []
    while third in scheduler.running:
        run(scheduler)
    assert released == [third]
    scheduler.finish(first)
    assert released == [third, first]
    scheduler.finish(third)
    assert released == [third, first]
    run_to_the_end(scheduler)
    assert released == [third, first, second]
