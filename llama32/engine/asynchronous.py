"""The engine for asyncio: it steps in a thread of its own, as long as there is something to do."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from threading import Condition, Thread

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.generate import Token
from llama32.settings import Sampling


class Listener:
    """One stream: what it waits for, and the request, once the thread has added it."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def wake(self) -> None:
        """There is news; told by the thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def unseen(self, seen: int) -> Sequence[Token]:
        """The tokens behind the first `seen`, as soon as there are any; none: it has ended."""
        while True:
            self._news.clear()
            has_ended = self.error or (self.request and self.request.finish_reason)
            if (self.request and len(self.request.tokens) > seen) or has_ended:
                return self.request.tokens[seen:] if self.request else ()
            await self._news.wait()


class AsyncEngine:
    """One engine for all coroutines, which never wait for its steps.

        async for token in engine.stream(prompt, Sampling(temperature=0)): ...

    A stream that nobody listens to any more, or whose task is cancelled, is aborted. What the
    model raises ends all requests that there are, since it was everyone's step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
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
        listener = Listener()

        def begin() -> None:
            try:
                request = self.engine.add(prompt, sampling, eos_ids=eos_ids, on_prefill=on_prefill)
            except Exception as error:  # carried to the one who asked: the thread serves all
                listener.error = error
                listener.wake()
            else:
                listener.request = request
                self._listeners[request] = listener

        def end() -> None:
            if listener.request is not None:
                del self._listeners[listener.request]
                self.engine.abort(listener.request)

        self._tell(begin)
        seen = 0
        try:
            while tokens := await listener.unseen(seen):
                for token in tokens:
                    seen += 1
                    yield token
        finally:
            self._tell(end)
        error = listener.error or (listener.request and listener.request.error)
        if error is not None:
            raise error

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
            self._wake(self._step())
        self.engine.close()
        for command in self._commands:
            command()
        self._wake(list(self._listeners))

    def _step(self) -> Iterable[Request]:
        try:
            return self.engine.step()
        except Exception as error:  # carried to those who wait for the step
            self.engine.fail(error)
            return list(self._listeners)

    def _wake(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request in self._listeners:
                self._listeners[request].wake()
