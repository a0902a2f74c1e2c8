"""The engine for asyncio: it steps in a thread of its own, as long as there is something to do."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import Condition, Thread

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.generate import Token
from llama32.settings import Sampling


class Listener:
    """One who waits for what becomes of some requests, once the thread has added them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.error: Exception | None = None  # why they could not be added
        self.were_added = False
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()

    async def added(self) -> Sequence[Request]:
        """The requests; raises what adding them did."""
        while not self.were_added:
            await self.change()
        if self.error is not None:
            raise self.error
        return self.requests

    async def change(self) -> None:
        """Wait until one of them has got a token or ended, since this returned last."""
        await self.news.wait()
        self.news.clear()


class AsyncEngine:
    """One engine for all coroutines, which never wait for its steps.

        async for token in engine.stream(prompt, Sampling(temperature=0)): ...

    A stream that nobody listens to any more, or whose task is cancelled, is aborted. What the
    model raises ends all requests that there are, since it was everyone's step; `error` is that,
    until a step goes well.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: Exception | None = None
        self._listeners: dict[Request, Listener] = {}  # the thread's own
        self._commands: list[Callable[[], None]] = []  # for the thread, between two steps
        self._changed = Condition()
        self._is_closed = False
        self._thread = Thread(target=self._work, name="llama32-engine", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        eos_ids: Collection[int] = (),
        on_prefill: Callable[[int, int], object] | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Queue a request, and yield its tokens as they come. Raises what `Engine.add` does, and
        what ended the request, if something did. `on_prefill` is called in the engine's thread."""
        add = partial(self.engine.add, prompt, sampling, eos_ids=eos_ids, on_prefill=on_prefill)
        with self.listen(add) as listener:
            (request,) = await listener.added()
            seen = 0
            while request.finish_reason is None or seen < len(request.tokens):
                if seen == len(request.tokens):
                    await listener.change()
                for token in request.tokens[seen:]:
                    seen += 1
                    yield token
        if request.error is not None:
            raise request.error

    @contextmanager
    def listen(self, *adds: Callable[[], Request]) -> Iterator[Listener]:
        """Queue requests, and hear of them as long as the block lasts; then they are aborted.

        Each of `adds` is called in the engine's thread and adds one, as `Engine.add` does.
        """
        listener = Listener()

        def begin() -> None:
            try:
                for add in adds:
                    request = add()
                    listener.requests.append(request)
                    self._listeners[request] = listener
            except Exception as error:  # carried to the one who asked: the thread serves all
                listener.error = error
            listener.were_added = True
            wake([listener])

        def end() -> None:
            for request in listener.requests:
                del self._listeners[request]
                self.engine.abort(request)

        self._tell(begin)
        try:
            yield listener
        finally:
            self._tell(end)

    def abort(self, request: Request) -> None:
        """End it, if it has not ended. Not waited for."""
        self._tell(partial(self.engine.abort, request))

    def fail(self, error: Exception) -> None:
        """End all with this error. Not waited for."""

        def end_all() -> None:
            self.engine.fail(error)
            self._wake(self._listeners)

        self._tell(end_all)

    async def close(self) -> None:
        """Abort all, end the thread and close the engine."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _tell(self, command: Callable[[], None]) -> None:
        with self._changed:
            if not self._is_closed:
                self._commands.append(command)
                self._changed.notify()
                return
        command()  # there is no thread any more

    def _work(self) -> None:
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._commands or self.engine.is_busy or self._is_closed
                )
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            self._step()
        self.engine.close()
        for command in self._commands:
            command()
        self._wake(self._listeners)

    def _step(self) -> None:
        try:
            if moved := self.engine.step():
                self.error = None
                self._wake(moved)
        except Exception as error:  # carried to those who wait for the step
            self.error = error
            self.engine.fail(error)
            self._wake(self._listeners)

    def _wake(self, requests: Iterable[Request]) -> None:
        wake(self._listeners[request] for request in requests if request in self._listeners)


def wake(listeners: Iterable[Listener]) -> None:
    """There is news for them, each in a loop of its own or all in one, which is told once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Listener]] = defaultdict(list)
    for listener in listeners:
        by_loop[listener.loop].append(listener)
    for loop, its in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(tell, its)


def tell(listeners: Iterable[Listener]) -> None:
    """In their own loop."""
    for listener in listeners:
        listener.news.set()
