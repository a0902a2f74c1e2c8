"""The server as a process: it listens, tells where, and ends with care."""

import asyncio
import logging
from collections.abc import Callable
from socket import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama32.serve.settings import ServeSettings

log = logging.getLogger("llama32.serve")
AFTER_THE_CUT = 10  # seconds for what was cut to say so
PATIENCE = 30.0  # seconds with a client on whom it is to go on, and who does not


class Protocol(H11Protocol):
    """Ends connections on which a request does not come, or an answer is not read: uvicorn would
    keep them, and an answer that waits in them, as long as the client does."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """As asyncio calls it."""
        super().connection_made(transport)
        self._watch(None)

    def _watch(self, before: object) -> None:
        if self not in self.connections:  # it has ended
            return
        unread = self.transport.get_write_buffer_size()
        now = self.cycle, unread
        if now == before and (unread or self.conn.their_state is h11.IDLE):
            self.transport.abort()
        else:
            self.loop.call_later(PATIENCE, self._watch, now)


class Server(uvicorn.Server):
    """Ends as soon as all running requests have, or `drain` seconds after it was told to: then
    those that still run end with an error that says so."""

    def __init__(
        self, app: FastAPI, settings: ServeSettings, on_start: Callable[[str], object]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=Protocol,  # h11 bounds the size of headers
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.drain) + AFTER_THE_CUT,
            )
        )
        self.service = app.state.service
        self.settings = settings
        self.on_start = on_start

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and tell where."""
        await super().startup(sockets)
        if self.started:
            address = self.servers[0].sockets[0].getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            self.on_start(f"http://{host}:{address[1]}")

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Take nothing more, and let what runs come to its end."""
        self.service.is_stopping = True
        log.info("stopping; %d requests are running", self.service.room.taken)
        cut = asyncio.get_running_loop().call_later(self.settings.drain, self.service.cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()


def run(app: FastAPI, settings: ServeSettings, on_start: Callable[[str], object]) -> None:
    """Until a signal ends it. `on_start` is told the address."""
    Server(app, settings, on_start).run()
