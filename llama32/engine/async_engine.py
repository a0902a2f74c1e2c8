"""The engine for asyncio: a thread runs the steps while there are requests."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import Condition, Thread

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.generate import Token
from llama32.sampling_params import Sampling


class Subscriber:
    """A consumer of requests, which the engine's thread adds and updates."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.error: Exception | None = None  # raised when adding the requests
        self.is_added = False
        self.loop = asyncio.get_running_loop()
        self.event = asyncio.Event()

    async def wait_until_added(self) -> Sequence[Request]:
        """Return the requests. Raises the error of `Engine.add`, if any."""
        while not self.is_added:
            await self.wait_for_update()
        if self.error is not None:
            raise self.error
        return self.requests

    async def wait_for_update(self) -> None:
        """Wait until a request has got a token or ended since the last call."""
        await self.event.wait()
        self.event.clear()


class AsyncEngine:
    """One engine for all coroutines; steps never block an event loop.

        async for token in engine.stream(prompt, Sampling(temperature=0)): ...

    Closing a stream or cancelling the task aborts the request. An exception of the model ends all
    requests, because all share the step; `error` keeps the exception until a step succeeds.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: Exception | None = None
        self._subscribers: dict[Request, Subscriber] = {}  # used by the thread only
        self._commands: list[Callable[[], None]] = []  # run by the thread between two steps
        self._condition = Condition()
        self._is_closed = False
        self._thread = Thread(target=self._run, name="llama32-engine", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        eos_ids: Collection[int] = (),
        on_prefill: Callable[[int, int], object] | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Queue a request and yield its tokens as they are generated.

        Raises the errors of `Engine.add`, and the error that ended the request, if any.
        `on_prefill` is called in the engine's thread.
        """
        add = partial(self.engine.add, prompt, sampling, eos_ids=eos_ids, on_prefill=on_prefill)
        with self.subscribe(add) as subscriber:
            (request,) = await subscriber.wait_until_added()
            seen = 0
            while request.finish_reason is None or seen < len(request.tokens):
                if seen == len(request.tokens):
                    await subscriber.wait_for_update()
                for token in request.tokens[seen:]:
                    seen += 1
                    yield token
        if request.error is not None:
            raise request.error

    @contextmanager
    def subscribe(self, *adds: Callable[[], Request]) -> Iterator[Subscriber]:
        """Queue requests and receive updates; on exit, abort the requests.

        Every function in `adds` calls `Engine.add` for one request, in the engine's thread.
        """
        subscriber = Subscriber()

        def begin() -> None:
            try:
                for add in adds:
                    request = add()
                    subscriber.requests.append(request)
                    self._subscribers[request] = subscriber
            except Exception as error:  # raised in the subscriber: the thread serves all requests
                subscriber.error = error
            subscriber.is_added = True
            notify([subscriber])

        def end() -> None:
            for request in subscriber.requests:
                del self._subscribers[request]
                self.engine.abort(request)

        self._submit(begin)
        try:
            yield subscriber
        finally:
            self._submit(end)

    def abort(self, request: Request) -> None:
        """Abort a request, unless it has ended. Returns without waiting for the thread."""
        self._submit(partial(self.engine.abort, request))

    def fail(self, error: Exception) -> None:
        """End all requests with an error. Returns without waiting for the thread."""

        def end_all() -> None:
            self.engine.fail(error)
            self._notify(self._subscribers)

        self._submit(end_all)

    async def close(self) -> None:
        """Abort all requests, stop the thread and close the engine."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)

    def _submit(self, command: Callable[[], None]) -> None:
        with self._condition:
            if not self._is_closed:
                self._commands.append(command)
                self._condition.notify()
                return
        command()  # the thread has ended

    def _run(self) -> None:
        while not self._is_closed:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._commands or self.engine.is_busy or self._is_closed
                )
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            self._step()
        self.engine.close()
        for command in self._commands:
            command()
        self._notify(self._subscribers)

    def _step(self) -> None:
        try:
            if updated := self.engine.step():
                self.error = None
                self._notify(updated)
        except Exception as error:  # raised in all streams that wait for the step
            self.error = error
            self.engine.fail(error)
            self._notify(self._subscribers)

    def _notify(self, requests: Iterable[Request]) -> None:
        notify(self._subscribers[request] for request in requests if request in self._subscribers)


def notify(subscribers: Iterable[Subscriber]) -> None:
    """Announce an update to subscribers, with one call per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Subscriber]] = defaultdict(list)
    for subscriber in subscribers:
        by_loop[subscriber.loop].append(subscriber)
    for loop, group in by_loop.items():
        with suppress(RuntimeError):  # a closed loop has no waiting subscribers
            loop.call_soon_threadsafe(set_events, group)


def set_events(subscribers: Iterable[Subscriber]) -> None:
    """Wake the subscribers; runs in their event loop."""
    for subscriber in subscribers:
        subscriber.event.set()
