import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest

from llama32.engine.async_engine import AsyncEngine, Subscriber, notify
from llama32.engine.request import Request
from llama32.engine.scheduler import ScheduledStep
from llama32.generate import Token
from llama32.sampling_params import Sampling
from tests.engine.fakes import FakeRunner, answer, make_engine, make_prompt, run_to_the_end

SHORT = Sampling(max_new_tokens=8)
LONG = Sampling(max_new_tokens=400)


def run(main: Coroutine) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


@asynccontextmanager
async def opened(**settings) -> AsyncIterator[tuple[AsyncEngine, FakeRunner]]:
    inner, runner = make_engine(**settings)
    engine = AsyncEngine(inner)
    try:
        yield engine, runner
    finally:
        await engine.close()


async def listen(stream: AsyncGenerator[Token, None], heard: list[int]) -> None:
    async for token in stream:
        heard.append(token.id)


async def ids(engine: AsyncEngine, prompt: list[int], sampling: Sampling = SHORT, **options):
    heard: list[int] = []
    await listen(engine.stream(prompt, sampling, **options), heard)
    return heard


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def until_finished(engine: AsyncEngine) -> None:
    await until(lambda: not engine.engine.is_busy and not engine._subscribers)
    assert engine.engine.stats.pages_held == 0


class Gate:
    """Blocks the engine's thread in the first step with an awaited request, until opened."""

    def __init__(self, is_awaited: Callable[[Request], bool] = lambda request: True) -> None:
        self.is_reached = threading.Event()
        self.was_in_time: bool | None = None
        self._is_awaited = is_awaited
        self._opened = threading.Event()

    def __call__(self, step: ScheduledStep) -> None:
        chunks = (*step.prefill, *step.decode)
        if self.was_in_time is None and any(self._is_awaited(chunk.request) for chunk in chunks):
            self.is_reached.set()
            self.was_in_time = self._opened.wait(10)

    async def reached(self) -> None:
        await until(self.is_reached.is_set)

    async def open(self) -> None:
        """Open the gate; fails if the actions meanwhile had to wait for the step."""
        self._opened.set()
        await until(lambda: self.was_in_time is not None)
        assert self.was_in_time


async def begin_all(
    engine: AsyncEngine,
    runner: FakeRunner,
    streams: Sequence[Coroutine],
    before_step: Callable[[ScheduledStep], object] = lambda step: None,
) -> list[asyncio.Task]:
    """Start all streams: the first gets a token alone, the rest join for the next step."""
    runner.before_step = gate = Gate()
    tasks = [asyncio.create_task(streams[0])]
    await gate.reached()
    tasks += [asyncio.create_task(stream) for stream in streams[1:]]
    await until(lambda: len(engine._commands) == len(streams) - 1)
    runner.before_step = before_step
    await gate.open()
    return tasks


def test_a_stream_yields_the_tokens_of_a_request_and_ends():
    async def main() -> None:
        async with opened() as (engine, _):
            tokens = [token async for token in engine.stream(make_prompt(100), SHORT)]
            assert [token.id for token in tokens] == answer(make_prompt(100), 8)
            assert [token.finish_reason for token in tokens] == [None] * 7 + ["length"]
            await until_finished(engine)

    run(main())


def test_many_streams_get_what_a_synchronous_engine_gives_them():
    prompts = [make_prompt(length, seed) for seed in range(10) for length in (5, 90, 130, 260)]
    samplings = [Sampling(max_new_tokens=5 + i % 17) for i in range(len(prompts))]
    settings = {"num_pages": 20, "max_running": 6, "prefill_tokens": 64}
    plain, _ = make_engine(**settings)
    requests = [plain.add(*arguments) for arguments in zip(prompts, samplings, strict=True)]
    run_to_the_end(plain)

    async def main() -> None:
        async with opened(**settings) as (engine, _):
            inputs = zip(prompts, samplings, strict=True)
            given = await asyncio.gather(*(ids(engine, *arguments) for arguments in inputs))
            assert given == [request.output for request in requests]
            await until_finished(engine)
            assert engine.engine.stats.generated == plain.stats.generated

    run(main())


def test_streams_run_together_in_the_same_steps():
    sizes = []

    async def main() -> None:
        async with opened() as (engine, runner):
            streams = [ids(engine, [i]) for i in range(10)]
            note = lambda step: sizes.append(len(step.decode))  # noqa: E731
            await asyncio.gather(*await begin_all(engine, runner, streams, note))

    run(main())
    assert [size for size in sizes if size] == [10] * 7 + [9]


def test_what_ends_a_stream_is_what_was_asked_for():
    prompt = make_prompt(10)
    expected = answer(prompt, 5)

    async def main() -> None:
        async with opened() as (engine, _):
            assert await ids(engine, prompt, LONG, eos_ids=expected[-1:]) == expected
            stop = Sampling(stop_ids=expected[2:3])
            assert await ids(engine, prompt, stop, eos_ids=expected[-1:]) == expected[:3]

    run(main())


def test_without_a_wish_it_is_the_default():
    async def main() -> None:
        async with opened() as (engine, _):
            tokens = [token async for token in engine.stream([3])]
            assert len(tokens) == Sampling().max_new_tokens

    run(main())


def test_the_reading_of_a_prompt_is_reported_from_the_thread():
    reports = []

    def report(*reached: int) -> None:
        reports.append((*reached, threading.current_thread().name))

    async def main() -> None:
        async with opened(prefill_tokens=64) as (engine, _):
            await ids(engine, make_prompt(150), on_prefill=report)

    run(main())
    assert reports == [(done, 150, "llama32-engine") for done in (64, 128, 150)]


def test_a_stream_that_nobody_begins_to_listen_to_asks_for_nothing():
    async def main() -> None:
        async with opened() as (engine, _):
            stream = engine.stream([3], SHORT)
            assert await ids(engine, [4]) == answer([4], 8)
            assert engine.engine.stats.generated == 8
            await stream.aclose()

    run(main())


def test_a_stream_that_pauses_holds_no_other_up_and_misses_nothing():
    async def main() -> None:
        async with opened() as (engine, _), aclosing(engine.stream([3], LONG)) as paused:
            heard = [(await anext(paused)).id]
            for i in range(5):
                assert await ids(engine, [i]) == answer([i], 8)
            await until(lambda: not engine.engine.is_busy)
            await listen(paused, heard)
            assert heard == answer([3], 400)

    run(main())


def test_listeners_in_several_loops_may_share_an_engine():
    given: list[list[int]] = []

    async def ask(engine: AsyncEngine, name: int) -> None:
        for _ in range(5):
            given.append(await ids(engine, [name], LONG))

    async def main() -> None:
        async with opened() as (engine, _):
            threads = [
                threading.Thread(target=run, args=(ask(engine, name),), daemon=True)
                for name in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                await asyncio.to_thread(thread.join, 25)

    run(main())
    expected = [answer([name], 400) for name in range(4) for _ in range(5)]
    assert sorted(given) == sorted(expected)


def test_nobody_is_woken_in_a_loop_that_is_closed():
    async def listen_no_more() -> Subscriber:
        return Subscriber()

    notify([asyncio.run(listen_no_more())])


def test_the_event_loop_turns_during_every_step():
    turned = []

    async def main() -> None:
        async with opened() as (engine, runner):
            loop = asyncio.get_running_loop()

            def ask_the_loop(step: ScheduledStep) -> None:
                answered = threading.Event()
                loop.call_soon_threadsafe(answered.set)
                turned.append(answered.wait(10))

            runner.before_step = ask_the_loop
            assert await ids(engine, make_prompt(100)) == answer(make_prompt(100), 8)
            runner.before_step = lambda step: None

    run(main())
    assert len(turned) >= 8
    assert all(turned)


def test_streams_can_be_begun_and_left_during_a_step():
    async def main() -> None:
        async with opened() as (engine, runner):
            runner.before_step = gate = Gate(lambda request: len(request.output) == 1)
            leaving, staying = engine.stream([1], LONG), engine.stream([2], SHORT)
            assert (await anext(leaving)).id == answer([1], 1)[0]
            await gate.reached()
            heard: list[int] = []
            task = asyncio.create_task(listen(staying, heard))
            cancelled = asyncio.create_task(ids(engine, [3], LONG))
            await asyncio.sleep(0)
            await leaving.aclose()
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert gate.was_in_time is None
            await gate.open()
            await task
            assert heard == answer([2], 8)
            await until_finished(engine)
            assert engine.engine.stats.generated == 2 + 8

    run(main())


async def once_reached(gate: Gate, stream: AsyncGenerator[Token, None]):
    """Yield the tokens of a stream once the engine has reached the gate."""
    async with aclosing(stream):
        async for token in stream:
            await gate.reached()
            yield token


async def leave_by_break(stream: AsyncGenerator[Token, None]) -> None:
    async for _ in stream:
        break


async def leave_by_aclose(stream: AsyncGenerator[Token, None]) -> None:
    await anext(stream)
    await stream.aclose()


async def leave_by_error(stream: AsyncGenerator[Token, None]) -> None:
    async def break_off() -> None:
        async with aclosing(stream):
            async for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await break_off()


async def leave_by_cancel(stream: AsyncGenerator[Token, None]) -> None:
    heard: list[int] = []
    task = asyncio.create_task(listen(stream, heard))
    await until(lambda: heard)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_aclose, leave_by_error, leave_by_cancel]
)
def test_a_stream_that_is_left_is_aborted_and_others_go_on(leave):
    prompt = make_prompt(100)

    async def main() -> None:
        async with opened() as (engine, runner):
            gate = Gate(lambda request: request.prompt == prompt and len(request.output) == 2)
            runner.before_step = gate
            other = asyncio.create_task(ids(engine, [3], LONG))
            leaving = asyncio.create_task(leave(once_reached(gate, engine.stream(prompt, LONG))))
            await gate.reached()
            scheduler = engine.engine.scheduler
            (left,) = [request for request in scheduler.running if request.prompt == prompt]
            await leaving
            await until(lambda: engine._commands)
            await gate.open()
            assert await other == answer([3], 400)
            assert left.finish_reason == "abort"
            assert left.output == answer(prompt, 3)
            await until_finished(engine)

    run(main())


def test_a_task_cancelled_before_its_first_token_frees_its_pages():
    async def main() -> None:
        async with opened(prefill_tokens=64) as (engine, runner):
            runner.before_step = gate = Gate(lambda request: request.num_computed == 64)
            task = asyncio.create_task(ids(engine, make_prompt(300)))
            await gate.reached()
            (request,) = engine.engine.scheduler.running
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gate.open()
            await until_finished(engine)
            assert (request.finish_reason, request.output) == ("abort", [])
            assert await ids(engine, [3]) == answer([3], 8)

    run(main())


def test_a_task_cancelled_before_its_request_was_added_asks_for_nothing_in_the_end():
    async def main() -> None:
        async with opened() as (engine, runner):
            runner.before_step = gate = Gate()
            other = asyncio.create_task(ids(engine, [3]))
            await gate.reached()
            task = asyncio.create_task(ids(engine, [4], LONG))
            await until(lambda: engine._commands)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gate.open()
            assert await other == answer([3], 8)
            await until_finished(engine)
            assert engine.engine.stats.generated == 8

    run(main())


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], SHORT, "it is empty"),
        ([300], SHORT, "token id 300"),
        ([3] * 200, LONG, "600 tokens .* has 4 in all"),
    ],
    ids=["empty", "vocabulary", "cache"],
)
def test_what_could_never_run_is_refused_in_the_stream(prompt, sampling, match):
    async def main() -> None:
        async with opened(num_pages=4) as (engine, _):
            other = asyncio.create_task(ids(engine, [3]))
            with pytest.raises(ValueError, match=match):
                await ids(engine, prompt, sampling)
            assert await other == answer([3], 8)
            assert await ids(engine, [4]) == answer([4], 8)

    run(main())


def test_whatever_add_raises_is_for_its_own_stream(monkeypatch):
    async def main() -> None:
        async with opened() as (engine, runner):
            with monkeypatch.context() as patch:
                patch.setattr(runner, "fingerprint", lambda: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await ids(engine, [3])
            assert await ids(engine, [3]) == answer([3], 8)

    run(main())


def test_what_the_model_raises_ends_all_streams_and_the_engine_goes_on():
    error = RuntimeError("out of memory")
    heard: list[list[int]] = [[], [], [], []]

    async def main() -> None:
        async with opened(max_running=3) as (engine, runner):

            def fail(step: ScheduledStep) -> None:
                if step.decode and len(step.decode[0].request.output) == 5:
                    runner.errors.append(error)

            streams = [listen(engine.stream([i], LONG), heard[i]) for i in range(4)]
            tasks = await begin_all(engine, runner, streams, fail)
            given = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(outcome is error for outcome in given)
            await until_finished(engine)
            runner.before_step = lambda step: None
            assert await ids(engine, [9]) == answer([9], 8)

    run(main())
    assert heard == [answer([i], length) for i, length in enumerate((5, 4, 4, 0))]


def test_a_row_that_is_not_finite_ends_its_own_stream_after_its_tokens():
    async def main() -> None:
        async with opened() as (engine, runner):
            runner.is_finite = lambda request, num_output: request.prompt != [7] or num_output < 3
            others = [asyncio.create_task(ids(engine, [i])) for i in range(3)]
            heard: list[int] = []
            with pytest.raises(FloatingPointError):
                await listen(engine.stream([7], SHORT), heard)
            assert heard == answer([7], 3)
            assert await asyncio.gather(*others) == [answer([i], 8) for i in range(3)]
            await until_finished(engine)

    run(main())


def test_what_on_prefill_raises_comes_out_of_its_own_stream():
    def report(done: int, total: int) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with opened() as (engine, _):
            other = asyncio.create_task(ids(engine, [3]))
            with pytest.raises(ZeroDivisionError):
                await ids(engine, make_prompt(100), on_prefill=report)
            assert await other == answer([3], 8)
            await until_finished(engine)

    run(main())


def test_close_ends_all_streams_and_the_thread():
    async def main() -> None:
        async with opened(max_running=2) as (engine, runner):
            gate = Gate(lambda request: len(request.output) == 5)
            streams = [ids(engine, [i], LONG) for i in range(4)]
            tasks = await begin_all(engine, runner, streams, gate)
            await gate.reached()
            closing = asyncio.create_task(engine.close())
            await until(lambda: engine._is_closed)
            await gate.open()
            await closing
            assert not engine._thread.is_alive()
            assert not engine.engine.is_busy
            assert engine.engine.stats.pages_held == 0
            expected = [answer([i], length) for i, length in enumerate((6, 5, 0, 0))]
            assert await asyncio.gather(*tasks) == expected

    run(main())


def test_a_stream_begun_after_close_says_that_it_is_closed():
    async def main() -> None:
        async with opened() as (engine, _):
            assert await ids(engine, [3]) == answer([3], 8)
            for _ in range(2):
                await engine.close()
                with pytest.raises(RuntimeError, match="the engine is closed"):
                    await ids(engine, [3])

    run(main())


def test_a_stream_that_was_not_yet_added_when_it_was_closed_says_so():
    async def main() -> None:
        async with opened() as (engine, runner):
            runner.before_step = gate = Gate()
            running = asyncio.create_task(ids(engine, [3]))
            await gate.reached()
            late = asyncio.create_task(ids(engine, [4]))
            await until(lambda: engine._commands)
            closing = asyncio.create_task(engine.close())
            await until(lambda: engine._is_closed)
            await gate.open()
            with pytest.raises(RuntimeError, match="the engine is closed"):
                await late
            await closing
            assert await running == answer([3], 1)

    run(main())


def test_a_stream_can_be_left_after_close():
    async def main() -> None:
        async with opened() as (engine, _):
            stream = engine.stream([3], LONG)
            await anext(stream)
            await engine.close()
            await stream.aclose()
            assert engine._subscribers == {}

    run(main())


def test_an_engine_that_did_nothing_can_be_closed():
    async def main() -> None:
        async with opened() as (engine, _):
            assert engine._thread.is_alive()
        assert not engine._thread.is_alive()

    run(main())


def test_an_engine_without_requests_does_not_step():
    async def main() -> None:
        async with opened() as (engine, runner):
            await ids(engine, [3])
            await until_finished(engine)
            await asyncio.sleep(0.05)
            assert runner.num_steps <= 8 + 2

    run(main())


def test_one_listener_hears_of_several_requests_and_may_end_one_of_them():
    async def main() -> None:
        async with opened() as (engine, _):
            adds = [partial(engine.engine.add, [i], LONG) for i in range(3)]
            with engine.subscribe(*adds) as listener:
                requests = await listener.wait_until_added()
                while len(requests[1].tokens) < 5:
                    await listener.wait_for_update()
                engine.abort(requests[1])
                while not all(request.finish_reason for request in requests):
                    await listener.wait_for_update()
            assert [r.finish_reason for r in requests] == ["length", "abort", "length"]
            assert requests[2].output == answer([2], 400)
            assert len(requests[1].output) < 400
            await until_finished(engine)

    run(main())


def test_if_one_of_several_cannot_be_added_none_runs_on():
    async def main() -> None:
        async with opened() as (engine, _):
            adds = [partial(engine.engine.add, prompt, LONG) for prompt in ([1], [])]
            with engine.subscribe(*adds) as listener, pytest.raises(ValueError, match="empty"):
                await listener.wait_until_added()
            await until_finished(engine)

    run(main())


def test_all_can_be_ended_with_an_error_of_ones_own():
    async def main() -> None:
        async with opened(max_running=2) as (engine, runner):
            gate = Gate(lambda request: len(request.output) == 5)
            streams = [ids(engine, [i], LONG) for i in range(4)]
            tasks = await begin_all(engine, runner, streams, gate)
            await gate.reached()
            error = TimeoutError("enough")
            engine.fail(error)
            await gate.open()
            given = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(outcome is error for outcome in given)
            assert engine.error is None  # it was not the model's
            await until_finished(engine)

    run(main())


def test_the_models_error_is_known_until_a_step_goes_well():
    async def main() -> None:
        async with opened() as (engine, runner):
            error = RuntimeError("out of memory")
            runner.errors.append(error)
            with pytest.raises(RuntimeError):
                await ids(engine, [3])
            assert engine.error is error
            assert await ids(engine, [3]) == answer([3], 8)
            assert engine.error is None

    run(main())
