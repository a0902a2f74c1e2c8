import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from threading import Barrier, Thread
from time import sleep

import pytest

from llama32.engine.engine import Engine, Stats
from llama32.engine.request import Request
from llama32.generate import Token
from llama32.sampling_params import Sampling
from tests.engine.fakes import (
    CONTEXT,
    VOCABULARY,
    FakeRunner,
    answer,
    make_engine,
    make_prompt,
    run_to_the_end,
)

SEEDS = count()


def add(engine: Engine, length: int = 10, new: int = 8, **options) -> Request:
    """Add a request with a new prompt."""
    return engine.add(make_prompt(length, next(SEEDS)), Sampling(max_new_tokens=new), **options)


def says(request: Request) -> list[int]:
    """Return the expected output so far."""
    return answer([*request.prompt], len(request.output))


def check_complete(*requests: Request) -> None:
    for request in requests:
        assert request.finish_reason == "length"
        assert request.length == request.max_length
        assert request.output == says(request)


def state(engine: Engine) -> tuple:
    """Return everything that a step changes."""
    requests = [*engine.scheduler.running, *engine.scheduler.waiting]
    each = [
        (request, [*request.output], [*request.tokens], request.num_computed, request.error)
        for request in requests
    ]
    return each, engine.stats


# Arguments.


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], Sampling(), "prompt: it is empty"),
        ([3, VOCABULARY], Sampling(), r"prompt: token id 256 is outside the vocabulary of 256"),
        ([-1, 3], Sampling(), r"prompt: token id -1 is outside"),
        ([3] * CONTEXT, Sampling(), r"its 1024 tokens leave no room .* context of 1024"),
        (
            [3],
            Sampling(logit_bias={5: 1, 256: 1}),
            r"logit_bias: token id 256 is outside the vocabulary of 256",
        ),
        (
            [3] * 200,
            Sampling(max_new_tokens=57),
            r"257 tokens \(200 of prompt\), 5 pages of 64, and the KV cache has 4 in all: ask",
        ),
    ],
    ids=["empty", "above", "below", "context", "bias", "cache"],
)
def test_what_could_never_run_is_refused_and_changes_nothing(prompt, sampling, match):
    engine, _ = make_engine(num_pages=4)
    running = add(engine)
    engine.step()
    before = state(engine)
    with pytest.raises(ValueError, match=match):
        engine.add(prompt, sampling)
    assert state(engine) == before
    run_to_the_end(engine)
    check_complete(running)


@pytest.mark.parametrize(
    ("prompt", "sampling", "num_pages"),
    [
        ([0], Sampling(max_new_tokens=1), 1),
        ([VOCABULARY - 1], Sampling(max_new_tokens=2), 1),
        ([3] * (CONTEXT - 1), Sampling(), CONTEXT // 64),
        ([3], Sampling(logit_bias={VOCABULARY - 1: 1}, max_new_tokens=2), 1),
        ([3] * 200, Sampling(max_new_tokens=56), 4),
    ],
    ids=["one", "last", "context", "bias", "cache"],
)
def test_what_can_just_be_run_is_not_refused(prompt, sampling, num_pages):
    engine, _ = make_engine(num_pages)
    request = engine.add(prompt, sampling)
    run_to_the_end(engine)
    check_complete(request)


def test_without_a_wish_it_is_the_default():
    engine, _ = make_engine()
    assert engine.add([3]).sampling == Sampling()


def test_the_prompt_is_kept_as_it_was_given():
    engine, _ = make_engine()
    prompt = [3, 4, 5]
    request = engine.add(prompt, Sampling(max_new_tokens=4))
    prompt[:] = [9]
    run_to_the_end(engine)
    assert request.output == answer([3, 4, 5], 4)


def test_seeds_that_are_given_are_kept():
    engine, _ = make_engine()
    for seed in (0, -5, 2**64 - 1):
        assert engine.add([3], Sampling(seed=seed)).seed == seed


def test_two_requests_without_a_seed_have_different_ones():
    engine, _ = make_engine()
    assert len({engine.add([3], Sampling()).seed for _ in range(20)}) == 20


def test_an_engine_with_a_seed_gives_the_same_ones_to_requests_without():
    first, second, other = (make_engine(seed=seed)[0] for seed in (3, 3, 4))
    given = [[engine.add([3], Sampling()).seed for _ in range(9)] for engine in (first, second)]
    assert given[0] == given[1]
    assert len(set(given[0])) == 9
    assert other.add([3], Sampling()).seed != given[0][0]


def test_the_settings_are_those_of_the_scheduler():
    engine, _ = make_engine(num_pages=7, max_running=3, prefill_tokens=70)
    scheduler = engine.scheduler
    assert (scheduler.max_running, scheduler.prefill_tokens) == (3, 70)
    assert (engine.stats.pages, scheduler.page_size) == (7, 64)


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_is_as_deterministic_as_its_runner(deterministic):
    runner = FakeRunner()
    runner.deterministic = deterministic
    assert Engine(runner).deterministic is deterministic


# Tokens and ends.


@pytest.mark.parametrize("length", [1, 64, 65, 700])
def test_a_request_grows_token_by_token_to_the_length_asked_for(length):
    engine, _ = make_engine()
    request = add(engine, length, new=6)
    assert request.finish_reason is None
    run_to_the_end(engine)
    check_complete(request)
    reasons = [None] * 5 + ["length"]
    assert request.tokens == [
        Token(id, None, reason) for id, reason in zip(request.output, reasons, strict=True)
    ]
    assert request.error is None


def test_requests_together_get_what_they_would_alone():
    engine, _ = make_engine(num_pages=40, prefill_tokens=64)
    requests = [add(engine, length, new) for length in (1, 63, 200) for new in (1, 5, 70)]
    run_to_the_end(engine)
    check_complete(*requests)


def test_the_end_of_the_context_is_an_end():
    engine, _ = make_engine()
    request = add(engine, CONTEXT - 3, new=500)
    run_to_the_end(engine)
    assert len(request.output) == 3
    check_complete(request)


@pytest.mark.parametrize("how", ["eos_ids", "stop_ids"])
def test_a_stop_id_is_the_last_token(how):
    engine, _ = make_engine()
    prompt = make_prompt(10)
    expected = answer(prompt, 5)
    stop = expected[-1], 254
    assert stop[0] not in expected[:-1]
    if how == "eos_ids":
        request = engine.add(prompt, Sampling(), eos_ids=stop)
    else:
        request = engine.add(prompt, Sampling(stop_ids=stop), eos_ids=[255])
    run_to_the_end(engine)
    assert request.output == expected
    assert [token.finish_reason for token in request.tokens] == [None] * 4 + ["stop"]
    assert request.finish_reason == "stop"


def test_eos_ids_can_be_ignored_and_stop_ids_not():
    engine, _ = make_engine()
    prompt = make_prompt(10)
    expected = answer(prompt, 5)
    sampling = Sampling(stop_ids=expected[-1:], ignore_eos=True)
    request = engine.add(prompt, sampling, eos_ids=expected[2:3])
    run_to_the_end(engine)
    assert request.output == expected
    assert request.finish_reason == "stop"


def test_a_stop_id_where_the_length_ends_is_a_stop():
    engine, _ = make_engine()
    prompt = make_prompt(10)
    request = engine.add(prompt, Sampling(max_new_tokens=5), eos_ids=answer(prompt, 5)[-1:])
    run_to_the_end(engine)
    assert len(request.output) == 5
    assert request.tokens[-1].finish_reason == request.finish_reason == "stop"


def test_a_stop_id_in_the_prompt_is_none():
    engine, _ = make_engine()
    request = engine.add([254, 255, 254], Sampling(max_new_tokens=5), eos_ids=[254, 255])
    run_to_the_end(engine)
    check_complete(request)


def test_it_is_busy_as_long_as_a_request_has_not_ended():
    engine, _ = make_engine(max_running=1)
    assert not engine.is_busy
    requests = [add(engine, new=2) for _ in range(2)]
    for _ in range(4):
        assert engine.is_busy
        engine.step()
    assert not engine.is_busy
    check_complete(*requests)


def test_a_step_tells_whom_it_gave_a_token_or_an_end():
    engine, runner = make_engine(prefill_tokens=64)
    short, long, broken = add(engine, 10, new=3), add(engine, 129, new=2), add(engine, 1)
    runner.is_finite = lambda request, num_output: request is not broken
    assert engine.step() == [short, broken]
    assert engine.step() == [short]
    assert engine.step() == [short, long]
    assert engine.step() == [long]
    assert engine.step() == []


# User callbacks are called.


def test_on_token_is_told_every_token_in_order():
    engine, _ = make_engine()
    received: dict[Request, list[Token]] = {}
    requests = []
    for new in (1, 5, 9):
        tokens: list[Token] = []
        requests.append(add(engine, new=new, on_token=tokens.append))
        received[requests[-1]] = tokens
    while engine.is_busy:
        engine.step()
        assert all(received[request] == request.tokens for request in requests)
    check_complete(*requests)


def test_when_a_token_is_told_all_requests_have_theirs():
    engine, _ = make_engine()
    seen = []

    def look(token: Token) -> None:
        seen.append([len(request.output) for request in requests])
        assert token is requests[0].tokens[-1]

    requests = [add(engine, new=3, on_token=look), add(engine, new=2)]
    run_to_the_end(engine)
    assert seen == [[1, 1], [2, 2], [3, 2]]
    check_complete(*requests)


@pytest.mark.parametrize(
    ("length", "reports"),
    [
        (1, [1]),
        (64, [64]),
        (65, [65]),
        (66, [64, 66]),
        (200, [64, 128, 192, 200]),
        (193, [64, 128, 193]),
    ],
)
def test_on_prefill_is_told_after_each_chunk_and_once_at_the_end(length, reports):
    engine, _ = make_engine(prefill_tokens=64)
    received = []
    request = add(engine, length, on_prefill=lambda *report: received.append(report))
    while engine.is_busy:
        engine.step()
        assert len(received) == min(engine.stats.steps, len(reports))
    assert received == [(done, length) for done in reports]
    check_complete(request)


def test_what_was_found_in_the_cache_is_not_reported_as_read():
    engine, _ = make_engine(prefill_tokens=64)
    received = []
    prompt = make_prompt(300)
    for _ in range(2):
        engine.add(
            prompt, Sampling(max_new_tokens=1), on_prefill=lambda *report: received.append(report)
        )
        run_to_the_end(engine)
    assert [done for done, _ in received] == [64, 128, 192, 256, 300, 300]


# User callbacks raise, abort and add.


def raising(error: BaseException, at: int) -> Callable:
    """Return a callback that raises on call number `at` and must not be called again."""
    calls = count(1)

    def callback(*received: object) -> None:
        n = next(calls)
        assert n <= at
        if n == at:
            raise error

    return callback


@pytest.mark.parametrize("at", [1, 3, 5], ids=["first", "amid", "last"])
@pytest.mark.parametrize("error", [ValueError("mine"), AssertionError(), StopIteration()])
def test_what_on_token_raises_ends_its_own_request_alone(error, at):
    engine, _ = make_engine()
    others = [add(engine, 100), add(engine, 5)]
    request = add(engine, 100, new=5, on_token=raising(error, at))
    others += [add(engine, 200), add(engine, 6)]
    while request.finish_reason is None:
        engine.step()
    assert request.finish_reason == "error"
    assert request.error is error
    assert len(request.tokens) == at
    assert request.output == says(request)
    assert request.pages == []
    assert request not in engine.scheduler.running
    run_to_the_end(engine)
    check_complete(*others)
    assert len(request.tokens) == at


@pytest.mark.parametrize(("at", "tokens"), [(1, 0), (2, 0), (3, 1)])
def test_what_on_prefill_raises_ends_its_own_request_alone(at, tokens):
    engine, _ = make_engine(prefill_tokens=64)
    error = ValueError("mine")
    others = [add(engine, 5)]
    request = add(engine, 190, on_prefill=raising(error, at))
    others += [add(engine, 100), add(engine, 6)]
    while request.finish_reason is None:
        engine.step()
    assert request.finish_reason == "error"
    assert request.error is error
    assert len(request.output) == tokens
    assert request.pages == []
    run_to_the_end(engine)
    check_complete(*others)


def test_of_two_callbacks_that_raise_the_first_counts():
    engine, _ = make_engine()
    first, second = ValueError("first"), ValueError("second")
    request = add(engine, on_prefill=raising(first, 1), on_token=raising(second, 1))
    run_to_the_end(engine)
    assert request.error is first


def test_what_one_began_to_read_is_read_to_the_end_by_who_waited_for_it():
    engine, _ = make_engine(prefill_tokens=64)
    error = ValueError("mine")
    prompt = make_prompt(300)
    first = engine.add(prompt, Sampling(max_new_tokens=4), on_prefill=raising(error, 2))
    second = engine.add(prompt, Sampling(max_new_tokens=4))
    run_to_the_end(engine)
    assert first.error is error
    assert second.num_cached == 128
    check_complete(second)


class RefusingMatcher:
    """Accepts a number of tokens, then raises, like a grammar that becomes too large."""

    is_finished = False

    def __init__(self, num_accepted: int) -> None:
        self.num_accepted = num_accepted

    def push(self, token: int) -> None:
        if not self.num_accepted:
            raise ValueError("too large")
        self.num_accepted -= 1


@pytest.mark.parametrize("num_accepted", [0, 2])
def test_a_token_that_the_matcher_refuses_is_not_delivered(num_accepted):
    engine, _ = make_engine()
    received: list[Token] = []
    matcher = RefusingMatcher(num_accepted)
    request, other = add(engine, matcher=matcher, on_token=received.append), add(engine)
    run_to_the_end(engine)
    assert (request.finish_reason, str(request.error)) == ("error", "too large")
    assert received == request.tokens
    assert len(received) == num_accepted
    check_complete(other)


def test_an_interrupt_in_a_callback_comes_out_and_all_is_in_order():
    engine, _ = make_engine()
    requests = [add(engine, on_token=raising(KeyboardInterrupt(), 2))]
    requests += [add(engine, 100) for _ in range(3)]
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [len(request.output) for request in requests] == [2] * 4
    requests[0].on_token = None
    run_to_the_end(engine)
    check_complete(*requests)


def test_a_callback_can_abort_its_own_request():
    engine, _ = make_engine()
    tokens = []

    def stop(token: Token) -> None:
        tokens.append(token)
        if len(tokens) == 3:
            engine.abort(request)

    request = add(engine, 100, on_token=stop)
    other = add(engine, 100)
    run_to_the_end(engine)
    assert request.finish_reason == "abort"
    assert request.error is None
    assert tokens == request.tokens
    assert len(tokens) == 3
    check_complete(other)


@pytest.mark.parametrize("victim", range(4))
def test_a_callback_can_abort_any_other_request(victim):
    engine, _ = make_engine(max_running=3)

    def abort(token: Token) -> None:
        if len(requests[1].tokens) == 3:
            engine.abort(requests[victim])
            assert requests[victim].pages == []

    requests = [add(engine), add(engine, on_token=abort), add(engine), add(engine)]
    run_to_the_end(engine)
    aborted = requests.pop(victim)
    assert aborted.finish_reason == "abort"
    assert len(aborted.output) == (0 if victim == 3 else 3)
    assert aborted.output == says(aborted)
    check_complete(*requests)


def test_a_callback_can_abort_while_a_prompt_is_read():
    engine, _ = make_engine(prefill_tokens=64)
    received = []

    def abort(*report: int) -> None:
        received.append(report)
        if len(received) == 2:
            engine.abort(request)

    request = add(engine, 300, on_prefill=abort)
    other = add(engine, 100)
    run_to_the_end(engine)
    assert received == [(64, 300), (128, 300)]
    assert (request.finish_reason, request.output) == ("abort", [])
    check_complete(other)


def test_a_callback_can_add_requests():
    engine, _ = make_engine()
    requests = []

    def more(token: Token) -> None:
        if len(requests) < 5:
            requests.append(add(engine, 70, new=3, on_token=more))

    requests.append(add(engine, new=1, on_token=more))
    run_to_the_end(engine)
    assert len(requests) == 5
    check_complete(*requests)


# Errors of the model.


@pytest.mark.parametrize("num_output", [0, 1, 4])
def test_a_row_that_is_not_finite_ends_its_own_request_alone(num_output):
    engine, runner = make_engine()
    received = []
    others = [add(engine, 100)]
    request = add(engine, 100, on_token=received.append)
    others += [add(engine, 100), add(engine)]
    runner.is_finite = lambda candidate, n: candidate is not request or n < num_output
    while request.finish_reason is None:
        engine.step()
    assert request.finish_reason == "error"
    assert isinstance(request.error, FloatingPointError)
    assert request.pages == []
    assert received == request.tokens
    assert len(received) == num_output
    assert request.output == says(request)
    assert all(len(other.output) == num_output + 1 for other in others)
    run_to_the_end(engine)
    check_complete(*others)
    assert engine.stats.generated == 3 * 8 + num_output


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_step_that_fails_leaves_all_as_it_was_and_can_be_done_again(after):
    engine, runner = make_engine(prefill_tokens=64, max_running=4)
    received = []
    requests = [add(engine, length, on_token=received.append) for length in (5, 100, 1, 200, 7, 64)]
    for _ in range(after):
        engine.step()
    engine.scheduler.schedule()  # who is next is decided already
    before, received_before = state(engine), [*received]
    error = RuntimeError("out of memory")
    for _ in range(3):
        runner.errors.append(error)
        with pytest.raises(RuntimeError) as caught:
            engine.step()
        assert caught.value is error
        assert state(engine) == before
        assert received == received_before
    run_to_the_end(engine)
    check_complete(*requests)
    assert engine.stats.steps == runner.num_steps


def test_fail_ends_all_with_this_error():
    engine, _ = make_engine(max_running=2)
    ended = add(engine, new=1)
    engine.step()
    requests = [add(engine, 100) for _ in range(4)]
    engine.step()
    error = RuntimeError("no device any more")
    engine.fail(error)
    assert not engine.is_busy
    assert [request.finish_reason for request in requests] == ["error"] * 4
    assert all(request.error is error for request in requests)
    assert [len(request.tokens) for request in requests] == [1, 1, 0, 0]
    assert engine.stats.pages_held == 0
    assert ended.error is None
    check_complete(ended)


def test_after_fail_new_requests_run():
    engine, _ = make_engine()
    failed = add(engine, 100)
    engine.step()
    engine.fail(RuntimeError())
    request = engine.add(failed.prompt, Sampling(max_new_tokens=5))
    run_to_the_end(engine)
    check_complete(request)
    assert request.num_cached == 64


# Abort, fail and close.


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_abort_frees_the_pages_at_once(steps):
    engine, _ = make_engine(prefill_tokens=64)
    request = add(engine, 100)
    for _ in range(steps):
        engine.step()
    assert engine.stats.pages_held == (2 if steps else 0)
    engine.abort(request)
    assert engine.stats.pages_held == 0
    assert not engine.is_busy
    assert (request.finish_reason, request.error) == ("abort", None)
    assert len(request.tokens) == max(steps - 1, 0)


def test_a_request_that_waits_can_be_aborted():
    engine, _ = make_engine(max_running=1)
    running, waiting, last = (add(engine) for _ in range(3))
    engine.step()
    engine.abort(waiting)
    assert engine.stats.waiting == 1
    run_to_the_end(engine)
    assert (waiting.finish_reason, waiting.output) == ("abort", [])
    check_complete(running, last)


def test_what_has_ended_stays_as_it_ended():
    engine, _ = make_engine()
    aborted, complete, other = add(engine), add(engine, new=1), add(engine)
    engine.step()
    for _ in range(2):
        engine.abort(aborted)
        engine.abort(complete)
    assert aborted.finish_reason == "abort"
    assert complete.finish_reason == "length"
    assert engine.scheduler.running == [other]
    run_to_the_end(engine)
    check_complete(complete, other)


def test_close_ends_all_and_frees_all():
    engine, _ = make_engine(max_running=2)
    ended = add(engine, 100, new=1)
    engine.step()
    requests = [add(engine, 100) for _ in range(4)]
    engine.step()
    assert engine.stats.pages_evictable
    engine.close()
    assert not engine.is_busy
    assert [request.finish_reason for request in requests] == ["abort"] * 4
    assert [len(request.tokens) for request in requests] == [1, 1, 0, 0]
    assert (engine.stats.pages_held, engine.stats.pages_evictable) == (0, 0)
    check_complete(ended)


def test_what_is_closed_says_so_and_can_be_closed_again():
    engine, _ = make_engine()
    request = add(engine)
    for _ in range(2):
        engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.add([3])
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.step()
        engine.abort(request)
        assert list(engine.stream(request)) == []


def test_an_engine_that_is_closed_lets_go_of_its_runner():
    engine, runner = make_engine()
    request = add(engine, 100)
    engine.step()
    gone = weakref.ref(runner)
    del runner
    assert gone() is not None
    engine.close()
    gc.collect()
    assert gone() is None
    assert request.finish_reason == "abort"


# Streams and threads.


def test_a_stream_yields_all_tokens_and_moves_others_on():
    engine, _ = make_engine()
    request, other = add(engine, 100), add(engine, 100, new=20)
    assert list(engine.stream(request)) == request.tokens
    check_complete(request)
    assert len(other.output) == 8
    assert list(engine.stream(other)) == other.tokens
    check_complete(other)


def test_a_stream_yields_each_token_as_soon_as_it_is_there():
    engine, _ = make_engine()
    request = add(engine)
    for n, token in enumerate(engine.stream(request), start=1):
        assert len(request.tokens) == n
        assert token is request.tokens[-1]
    check_complete(request)


def test_streams_can_be_listened_to_in_turns():
    engine, _ = make_engine()
    requests = [add(engine, new=6), add(engine, 600, new=6), add(engine, new=6)]
    rounds = list(zip(*(engine.stream(request) for request in requests), strict=True))
    assert [list(tokens) for tokens in zip(*rounds, strict=True)] == [
        request.tokens for request in requests
    ]
    check_complete(*requests)


def test_leaving_a_stream_early_aborts_it():
    engine, _ = make_engine()
    request, other = add(engine, 100), add(engine, 100)
    stream = engine.stream(request)
    assert next(stream) == request.tokens[0]
    before = engine.stats.pages_held
    stream.close()
    assert request.finish_reason == "abort"
    assert engine.stats.pages_held == before - 2
    run_to_the_end(engine)
    assert len(request.tokens) == 1
    check_complete(other)


def test_a_stream_ends_where_another_aborts_it():
    engine, _ = make_engine()
    request = add(engine)
    seen = []
    for token in engine.stream(request):
        seen.append(token)
        if len(seen) == 3:
            engine.abort(request)
    assert seen == request.tokens
    assert len(seen) == 3


def test_a_stream_raises_what_ended_it_after_the_tokens_before():
    engine, runner = make_engine()
    request = add(engine)
    runner.is_finite = lambda candidate, num_output: num_output < 3
    seen = []
    with pytest.raises(FloatingPointError) as caught:
        seen.extend(engine.stream(request))
    assert caught.value is request.error
    seen.clear()
    stream = engine.stream(request)
    seen = [next(stream) for _ in range(3)]
    with pytest.raises(FloatingPointError):
        next(stream)
    assert seen == request.tokens


def test_a_stream_whose_step_fails_raises_that_and_is_aborted():
    engine, runner = make_engine()
    request, other = add(engine), add(engine)
    stream = engine.stream(request)
    next(stream)
    error = RuntimeError("out of memory")
    runner.errors.append(error)
    with pytest.raises(RuntimeError) as caught:
        next(stream)
    assert caught.value is error
    assert request.finish_reason == "abort"
    run_to_the_end(engine)
    check_complete(other)


def test_wait_steps_until_there_is_more_and_no_further():
    engine, runner = make_engine(prefill_tokens=64)
    request = add(engine, 150, new=5)
    engine.wait(request, 0)
    assert (len(request.tokens), runner.num_steps) == (1, 3)
    engine.wait(request, 0)
    assert runner.num_steps == 3
    engine.wait(request, 3)
    assert (len(request.tokens), runner.num_steps) == (4, 6)
    engine.wait(request, 100)
    check_complete(request)
    engine.wait(request, 100)
    assert runner.num_steps == 7


def test_who_waits_while_another_steps_does_not_step_once_more():
    engine, runner = make_engine()
    first, second = add(engine), add(engine)
    waiting = Thread(target=engine.wait, args=(second, 0), daemon=True)

    def begin(step: object) -> None:
        if not runner.num_steps:
            waiting.start()
            sleep(0.1)  # it comes to wait for this very step

    runner.before_step = begin
    engine.wait(first, 0)
    waiting.join(30)
    assert not waiting.is_alive()
    assert runner.num_steps == 1


def together(*tasks: Callable[[], object]) -> None:
    """Run each task in a new thread, all at once; raise the error of any task."""
    errors = []
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], object]) -> None:
        try:
            barrier.wait(30)
            task()
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for error in errors:
        raise error


def test_threads_that_share_an_engine_get_what_they_would_alone():
    engine, runner = make_engine(num_pages=24, max_running=5, prefill_tokens=64)
    prompts = [make_prompt(n) for n in (10, 70, 140, 300)]  # partly alike
    given: dict[int, list] = {}

    def ask(name: int) -> None:
        given[name] = []
        for i in range(8):
            prompt = [*prompts[(name + i) % 4], name]
            request = engine.add(prompt, Sampling(max_new_tokens=10 + name))
            streamed = [token.id for token in engine.stream(request)]
            given[name].append((prompt, streamed, request.finish_reason))

    together(*(lambda name=name: ask(name) for name in range(8)))
    for name in range(8):
        for prompt, streamed, reason in given[name]:
            assert streamed == answer(prompt, 10 + name)
            assert reason == "length"
    assert engine.stats.generated == sum(8 * (10 + name) for name in range(8))
    assert engine.stats.pages_held == 0
    assert runner.num_steps < engine.stats.generated


def test_threads_may_abort_what_others_listen_to():
    engine, _ = make_engine(max_running=4)
    heard: dict[Request, list[Token]] = {}

    def abort(_: Token) -> None:
        """Abort in the thread that runs the step, before the requests can end."""
        for request in requests[::2]:
            if len(request.output) >= 5:
                engine.abort(request)

    requests = [add(engine, 100, new=300, on_token=abort) for _ in range(8)]

    def listen(request: Request) -> None:
        heard[request] = list(engine.stream(request))

    together(*(lambda request=request: listen(request) for request in requests))
    assert all(heard[request] == request.tokens for request in requests)
    for request in requests[::2]:
        assert request.finish_reason == "abort"
        assert request.output == says(request)
    check_complete(*requests[1::2])
    assert engine.stats.pages_held == 0


# Prefix cache and counters.


FRESH = Stats(
    steps=0,
    prompt_computed=0,
    prompt_cached=0,
    generated=0,
    drafted=0,
    accepted=0,
    preemptions=0,
    running=0,
    waiting=0,
    pages_held=0,
    pages_evictable=0,
    pages=32,
)


def test_a_new_engine_has_done_nothing():
    engine, _ = make_engine()
    assert engine.stats == FRESH
    assert engine.stats.hit_rate == 0


def test_the_old_name_of_evictable_pages_warns():
    stats = replace(FRESH, pages_evictable=3)
    with pytest.warns(DeprecationWarning, match="use Stats.pages_evictable"):
        assert stats.pages_idle == 3


def test_pages_and_requests_in_use_are_counted():
    engine, _ = make_engine(max_running=2, prefill_tokens=64)
    for _ in range(5):
        add(engine, 100)
    assert engine.stats == replace(FRESH, waiting=5)
    engine.step()
    assert engine.stats == replace(FRESH, steps=1, running=2, waiting=3, pages_held=4)
    engine.step()
    assert engine.stats == replace(
        FRESH, steps=2, running=2, waiting=3, pages_held=4, prompt_computed=100, generated=1
    )


def test_what_was_done_is_counted():
    engine, _ = make_engine()
    prompt = make_prompt(130)
    for _ in range(2):
        engine.add(prompt, Sampling(max_new_tokens=3))
        run_to_the_end(engine)
    assert engine.stats == replace(
        FRESH, steps=6, prompt_computed=132, prompt_cached=128, generated=6, pages_evictable=2
    )
    assert engine.stats.hit_rate == 128 / 260


def test_preemptions_are_counted_and_a_prompt_counts_once():
    engine, _ = make_engine(num_pages=4)
    requests = [add(engine, 60, new=140), add(engine, 60, new=140)]
    run_to_the_end(engine)
    check_complete(*requests)
    stats = engine.stats
    assert stats.preemptions == sum(request.num_preemptions for request in requests) > 0
    assert (stats.prompt_computed, stats.prompt_cached, stats.generated) == (120, 0, 280)


def test_a_request_knows_how_much_of_its_prompt_was_in_the_cache():
    engine, _ = make_engine()
    first = add(engine, 200)
    engine.step()
    beginnings = [first.prompt[:length] for length in (63, 64, 65, 128, 129, 200)]
    others = [engine.add(prompt, Sampling(max_new_tokens=4)) for prompt in beginnings]
    others.append(engine.add([*first.prompt[:150], 255], Sampling(max_new_tokens=4)))
    others.append(add(engine, 200))
    run_to_the_end(engine)
    assert first.num_cached == 0
    assert [other.num_cached for other in others] == [0, 0, 64, 64, 128, 192, 128, 0]
    check_complete(first, *others)


def ask_again(engine: Engine, request: Request) -> int:
    """Return how many prompt tokens of an earlier request are still cached."""
    again = engine.add(request.prompt, Sampling(max_new_tokens=3))
    run_to_the_end(engine)
    check_complete(again)
    return again.num_cached


def test_prefixes_of_an_earlier_model_are_cleared_when_no_request_runs():
    engine, runner = make_engine()
    first = add(engine, 200)
    run_to_the_end(engine)
    assert ask_again(engine, first) == 192
    assert runner.num_resets == 0
    runner.weights = 1
    assert ask_again(engine, first) == 0
    assert runner.num_resets == 1
    assert ask_again(engine, first) == 192
    assert runner.num_resets == 1


def test_a_change_of_the_model_is_not_looked_for_while_the_engine_is_busy():
    engine, runner = make_engine()
    first = add(engine, 200)
    engine.step()
    runner.weights = 1
    second = engine.add(first.prompt, Sampling(max_new_tokens=30))
    run_to_the_end(engine)
    assert runner.num_resets == 0
    assert second.num_cached == 192
    check_complete(first, second)
    assert ask_again(engine, first) == 0
    assert runner.num_resets == 1


def test_prefixes_can_be_cleared():
    engine, _ = make_engine()
    first = add(engine, 200)
    run_to_the_end(engine)
    assert engine.stats.pages_evictable == 3
    engine.forget_prefixes()
    assert engine.stats.pages_evictable == 0
    assert ask_again(engine, first) == 0
    assert ask_again(engine, first) == 192


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_prefixes_can_be_cleared_while_requests_run(steps):
    engine, _ = make_engine(prefill_tokens=64)
    first, second = add(engine, 100), add(engine, 200)
    same = engine.add(first.prompt, Sampling(max_new_tokens=6))
    for _ in range(steps):
        engine.step()
    engine.forget_prefixes()
    run_to_the_end(engine)
    check_complete(first, second, same)
    assert engine.scheduler._pending == {}


def test_a_snapshot_has_the_pages_of_running_requests_and_the_evictable_pages():
    engine, _ = make_engine(max_running=2)
    first, _, _ = requests = [add(engine, 200, new=90), add(engine, 70), add(engine, 30)]
    engine.step()
    seen = engine.snapshot()
    assert (seen.num_pages, seen.page_size, seen.num_waiting) == (32, 64, 1)
    assert [request for request, _ in seen.running] == requests[:2]
    assert [[*pages] for _, pages in seen.running] == [request.pages for request in requests[:2]]
    assert seen.evictable == []
    run_to_the_end(engine)
    assert seen.running[0][1]  # a snapshot does not change
    assert first.pages == []
    seen = engine.snapshot()
    assert (seen.running, seen.num_waiting) == ([], 0)
    assert len(seen.evictable) == engine.stats.pages_evictable == 4
    assert seen.evictable == sorted(seen.evictable)
