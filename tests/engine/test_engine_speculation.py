"""The engine with drafts: the same tokens, callbacks and counts."""

import gc
import weakref

import pytest

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings
from llama32.generate import Token
from llama32.sampling_params import Sampling
from tests.engine.fakes import (
    ANSWERS,
    CONTEXT,
    FakeDrafts,
    FakeRunner,
    answer,
    make_engine,
    make_prompt,
    run_to_the_end,
)

QUALITIES = [0.0, 0.3, 0.8, 1.0]


def make(quality: float = 1.0, num_tokens: int = 4, **options) -> tuple[Engine, FakeRunner]:
    return make_engine(speculation=FakeDrafts(quality, num_tokens), **options)


def drafts_of(engine: Engine) -> FakeDrafts:
    drafter = engine._speculator._drafter
    assert isinstance(drafter, FakeDrafts)
    return drafter


def add(engine: Engine, length: int = 10, new: int = 8, seed: int = 0, **options) -> Request:
    return engine.add(make_prompt(length, seed), Sampling(max_new_tokens=new), **options)


def check_complete(*requests: Request) -> None:
    for request in requests:
        assert request.finish_reason == "length"
        assert request.length == request.max_length
        assert request.output == answer([*request.prompt], len(request.output))


@pytest.mark.parametrize("quality", QUALITIES)
def test_tokens_are_the_same_however_good_the_drafts(quality):
    engine, _ = make(quality, num_pages=6, prefill_tokens=64)
    cuts = [(length, new) for length in (1, 63, 64, 200) for new in (1, 2, 5, 90)]
    requests = [add(engine, *cut, seed) for seed, cut in enumerate(cuts)]
    run_to_the_end(engine)
    check_complete(*requests)
    assert engine.stats.preemptions > 0


def test_right_drafts_give_several_tokens_in_a_step():
    engine, runner = make()
    request = add(engine, new=20)
    for length in (5, 10, 15, 20):
        assert engine.step() == [request]
        assert len(request.output) == len(request.tokens) == length
    check_complete(request)
    assert runner.num_steps == 4
    assert [token.finish_reason for token in request.tokens] == [None] * 19 + ["length"]


def test_a_step_tells_of_each_request_once():
    engine, _ = make()
    first, second = add(engine, seed=1), add(engine, seed=2)
    assert engine.step() == [first, second]


def test_nothing_comes_behind_the_length_asked_for_or_the_context():
    engine, _ = make(num_tokens=9)
    requests = [add(engine, new=new, seed=new) for new in range(1, 13)]
    requests += [add(engine, CONTEXT - left, new=50, seed=90 + left) for left in (1, 2, 5)]
    run_to_the_end(engine)
    check_complete(*requests)
    assert [len(request.output) for request in requests[-3:]] == [1, 2, 5]


@pytest.mark.parametrize("at", range(1, 9))
def test_nothing_comes_behind_a_stop_id(at):
    engine, _ = make()
    prompt = make_prompt(10, 3)
    expected = answer(prompt, at)
    assert expected[-1] not in expected[:-1]
    received: list[Token] = []
    request = engine.add(
        prompt, Sampling(max_new_tokens=40, stop_ids=expected[-1:]), on_token=received.append
    )
    other = add(engine, new=30)
    run_to_the_end(engine)
    assert request.output == expected
    assert request.finish_reason == received[-1].finish_reason == "stop"
    assert received == request.tokens
    check_complete(other)
    assert engine.stats.generated == at + 30


def test_on_token_is_told_one_by_one_and_finds_it_the_last():
    engine, _ = make()
    received: list[tuple[Token, int]] = []
    request = add(
        engine, new=13, on_token=lambda token: received.append((token, len(request.tokens)))
    )
    other = add(engine, new=7, seed=1)
    run_to_the_end(engine)
    assert received == [(token, n) for n, token in enumerate(request.tokens, start=1)]
    check_complete(request, other)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_on_prefill_ends_with_the_prompt(length):
    engine, _ = make(prefill_tokens=64)
    received = []
    request = add(engine, length, on_prefill=lambda *report: received.append(report))
    run_to_the_end(engine)
    assert received[-1] == (length, length)
    assert len(received) == len(set(received))
    check_complete(request)


def test_on_prefill_is_told_once_in_a_step_in_which_others_get_several_tokens():
    engine, _ = make(prefill_tokens=64)
    received = []
    add(engine, 1, new=100)
    add(engine, 200, seed=1, on_prefill=lambda done, total: received.append(done))
    run_to_the_end(engine)
    assert received == [64, 128, 192, 200]


@pytest.mark.parametrize("at", range(1, 10))
@pytest.mark.parametrize("how", ["abort", "raise"])
def test_who_ends_a_request_at_a_token_gets_none_behind_it(how, at):
    engine, _ = make()
    error = ValueError("mine")

    def end(token: Token) -> None:
        assert len(request.tokens) <= at
        if len(request.tokens) == at:
            if how == "raise":
                raise error
            engine.abort(request)

    request, other = add(engine, new=9, on_token=end), add(engine, new=30, seed=1)
    run_to_the_end(engine)
    assert request.output == answer([*request.prompt], at)
    assert request.error is (error if how == "raise" else None)
    if how == "raise":
        assert request.finish_reason == "error"
    else:
        assert request.finish_reason == ("length" if at == 9 else "abort")
    check_complete(other)


def test_a_callback_can_abort_another_in_the_middle_of_its_tokens():
    engine, _ = make()
    received = []

    def abort(token: Token) -> None:
        received.append(token)
        if len(received) == 3:
            engine.abort(other)

    request = add(engine, new=20, on_token=abort)
    other = add(engine, new=20, seed=1)
    run_to_the_end(engine)
    assert other.finish_reason == "abort"
    assert other.output == answer([*other.prompt], 3)
    check_complete(request)


def test_a_callback_may_step_in_the_middle_of_the_tokens():
    engine, _ = make()
    received = []

    def go_on(token: Token) -> None:
        received.append(token)
        if len(received) in (2, 3):
            engine.step()

    requests = [add(engine, new=30, on_token=go_on), add(engine, new=30, seed=1)]
    run_to_the_end(engine)
    check_complete(*requests)
    assert engine.stats.generated == 60


def test_an_interrupt_in_the_middle_of_the_tokens_loses_those_behind_it_for_a_step_only():
    engine, _ = make()

    def interrupt(token: Token) -> None:
        if len(request.tokens) == 3:
            raise KeyboardInterrupt

    request, other = add(engine, new=20, on_token=interrupt), add(engine, new=20, seed=1)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert (len(request.output), len(other.output)) == (3, 3)
    run_to_the_end(engine)
    check_complete(request, other)


@pytest.mark.parametrize("num_output", range(7))
def test_a_row_that_is_not_finite_ends_its_request_when_it_comes_to_it(num_output):
    engine, runner = make()
    request, other = add(engine, 100), add(engine, 100, seed=1)
    runner.is_finite = lambda candidate, n: candidate is not request or n != num_output
    run_to_the_end(engine)
    assert isinstance(request.error, FloatingPointError)
    assert request.output == answer([*request.prompt], num_output)
    check_complete(other)


def test_a_row_behind_a_wrong_draft_may_be_anything():
    engine, runner = make(quality=0.0)
    request = add(engine)
    runner.is_finite = lambda candidate, num_output: num_output == len(candidate.output)
    run_to_the_end(engine)
    check_complete(request)


def test_drafts_and_those_that_were_right_are_counted():
    engine, _ = make()
    add(engine, new=13)
    run_to_the_end(engine)
    stats = engine.stats
    assert (stats.steps, stats.drafted, stats.accepted) == (3, 4 + 4 + 2, 4 + 4 + 2)
    assert (stats.generated, stats.acceptance_rate) == (13, 1)
    engine, _ = make(quality=0.0)
    add(engine, new=13)
    run_to_the_end(engine)
    stats = engine.stats
    assert (stats.steps, stats.accepted, stats.acceptance_rate) == (13, 0, 0)
    assert stats.drafted == 4 + 2 + 1 + 1


def test_without_speculation_nothing_is_drafted():
    engine, _ = make_engine()
    add(engine)
    run_to_the_end(engine)
    assert (engine.stats.drafted, engine.stats.accepted) == (0, 0)
    assert engine.stats.acceptance_rate == 0


@pytest.mark.parametrize("where", ["model", "drafter"])
def test_what_a_step_raises_leaves_all_as_it_was(where):
    engine, runner = make(prefill_tokens=64)
    drafts = drafts_of(engine)
    requests = [add(engine, length, new=40, seed=length) for length in (5, 100, 1, 200)]
    engine.step()
    error = RuntimeError("out of memory")

    def fail(limits):
        raise error

    for _ in range(30):
        before = (
            [([*request.output], request.num_computed, request.error) for request in requests],
            engine.stats.drafted,
        )
        if where == "model":
            runner.errors.append(error)
        else:
            drafts.propose = fail
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                engine.step()
            runner.errors[:] = [error] * (where == "model")
            assert caught.value is error
        runner.errors.clear()
        drafts.propose = type(drafts).propose.__get__(drafts)
        after = (
            [([*request.output], request.num_computed, request.error) for request in requests],
            engine.stats.drafted,
        )
        assert after == before
        engine.step()
    run_to_the_end(engine)
    check_complete(*requests)


def test_a_stream_yields_all_tokens():
    engine, _ = make()
    request, other = add(engine, new=23), add(engine, new=30, seed=1)
    assert list(engine.stream(request)) == request.tokens
    assert list(engine.stream(other)) == other.tokens
    check_complete(request, other)


def test_leaving_a_stream_early_aborts_it():
    engine, _ = make()
    request = add(engine, new=23)
    stream = engine.stream(request)
    assert [next(stream).id for _ in range(3)] == answer([*request.prompt], 3)
    stream.close()
    assert request.finish_reason == "abort"
    assert engine.stats.pages_held == 0


def test_a_drafter_is_told_of_the_engine_s_model_and_cache():
    drafts = FakeDrafts()
    make_engine(num_pages=7, page_size=128, speculation=drafts, max_running=3)
    settings: EngineSettings = drafts.settings
    assert (settings.page_size, settings.cache_tokens) == (128, 7 * 128)
    assert settings.max_running == 3


def test_a_drafter_releases_requests_that_ended_or_were_preempted():
    engine, _ = make(num_pages=4)
    drafts = drafts_of(engine)
    requests = [add(engine, 60, new=140, seed=seed) for seed in range(2)]
    while engine.is_busy:
        engine.step()
        assert drafts.tracked <= {*engine.scheduler.running}
    assert engine.stats.preemptions > 0
    assert not drafts.tracked
    check_complete(*requests)


def test_an_engine_that_is_closed_lets_go_of_its_drafter():
    engine = Engine(FakeRunner(), EngineSettings(speculation=Once()))
    add(engine)
    engine.step()
    gone = weakref.ref(engine._speculator._drafter)
    engine.close()
    gc.collect()
    assert gone() is None


class Once(FakeDrafts):
    """Creates a drafter without keeping a reference."""

    def drafter(self, config, settings) -> FakeDrafts:
        return FakeDrafts()


def test_the_fake_gets_as_much_right_as_it_says():
    """Without this quality, the tests above would show nothing."""
    request = Request(prompt=make_prompt(10), max_length=500)
    for quality in QUALITIES:
        guess = FakeDrafts(quality).propose({request: 200})[request]
        num_right = sum(a == b for a, b in zip(guess, answer([*request.prompt], 200), strict=True))
        assert abs(num_right / 200 - quality) < 0.1
        assert max(guess) < ANSWERS
