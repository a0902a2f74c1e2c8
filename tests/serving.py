"""A server for tests, on a free port, in a thread of the test process."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from openai import OpenAI

from llama32.engine.engine import Engine
from llama32.llm.llm import LLM
from llama32.serve.app import create_app
from llama32.serve.server import Server
from llama32.serve.service import Service
from llama32.serve.settings import ServeSettings
from tests.rawhttp import JSON, ask

COMPLETE = "/v1/completions"
HELLO = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}


@dataclass
class Served:
    """A running server."""

    url: str
    port: int
    service: Service
    server: Server

    @property
    def engine(self) -> Engine:
        return self.service.llm.engine

    def client(self, **options) -> OpenAI:
        """Return OpenAI's client, without retries."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return OpenAI(base_url=f"{self.url}/v1", **options)

    def assert_idle(self) -> None:
        """Wait until all requests have ended and left no page, slot or subscriber behind."""
        until(lambda: not self.engine.is_busy and not self.service.slots.taken)
        until(lambda: not self.service.engine._subscribers)
        assert self.engine.stats.pages_held == 0


def assert_unharmed(served: Served, hello: str) -> None:
    """Check that the server is idle and still gives the same answer to HELLO."""
    served.assert_idle()
    headers = JSON | {"Authorization": f"Bearer {served.service.settings.api_key}"}
    assert ask(served.port, COMPLETE, HELLO, headers).text == hello


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds:g} seconds"
        time.sleep(0.005)


@contextmanager
def serving(llm: LLM, name: str = "tiny", **settings) -> Iterator[Served]:
    """Run a server with these settings for the block."""
    serve_settings = ServeSettings(**{"port": 0, "drain": 0.0, **settings})
    app = create_app(llm, serve_settings, name)
    is_up = Event()
    urls: list[str] = []

    def on_start(url: str) -> None:
        urls.append(url)
        is_up.set()

    server = Server(app, serve_settings, on_start)
    thread = Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert is_up.wait(30), "the server did not start"
    try:
        port = int(urls[0].rpartition(":")[2])
        yield Served(urls[0], port, app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
