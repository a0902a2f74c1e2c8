"""A server for tests: on a free port of this machine, in a thread of the test's own process."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from openai import OpenAI

from llama32.engine.engine import Engine
from llama32.llm import LLM
from llama32.serve.app import create_app
from llama32.serve.server import Server
from llama32.serve.service import Service
from llama32.serve.settings import ServeSettings
from tests.rawhttp import JSON, ask

COMPLETE = "/v1/completions"
HELLO = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}


@dataclass
class Served:
    """A server that runs."""

    url: str
    port: int
    service: Service
    server: Server

    @property
    def engine(self) -> Engine:
        return self.service.llm.engine

    def client(self, **options) -> OpenAI:
        """OpenAI's own, which does not try again where it is refused."""
        given = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return OpenAI(base_url=f"{self.url}/v1", **given)

    def assert_idle(self) -> None:
        """All that was asked for comes to an end, and leaves no page, no place and no listener."""
        until(lambda: not self.engine.is_busy and not self.service.room.taken)
        until(lambda: not self.service.engine._listeners)
        assert self.engine.stats.pages_held == 0


def assert_unharmed(served: Served, hello: str) -> None:
    """Nothing is left of what was asked, and HELLO is answered as ever."""
    served.assert_idle()
    headers = JSON | {"Authorization": f"Bearer {served.service.settings.api_key}"}
    assert ask(served.port, COMPLETE, HELLO, headers).text == hello


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


@contextmanager
def serving(llm: LLM, name: str = "tiny", **settings) -> Iterator[Served]:
    """A server with these settings, until the end of the block."""
    given = ServeSettings(**{"port": 0, "drain": 0.0, **settings})
    app = create_app(llm, given, name)
    is_up = Event()
    told: list[str] = []

    def on_start(url: str) -> None:
        told.append(url)
        is_up.set()

    server = Server(app, given, on_start)
    thread = Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert is_up.wait(30), "the server did not start"
    try:
        port = int(told[0].rpartition(":")[2])
        yield Served(told[0], port, app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
