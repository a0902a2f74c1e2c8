"""The server process: startup, connections, graceful shutdown."""

import asyncio
import logging
from collections.abc import Callable
from socket import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama32.serve.service import Service
from llama32.serve.settings import ServeSettings

log = logging.getLogger("llama32.serve")
ABORT_SECONDS = 10  # for aborted requests to send their error
IDLE_SECONDS = 30.0  # without progress on a connection while the client has to act


class IdleTimeoutProtocol(H11Protocol):
    """Aborts the connection if the client sends no request or does not read the response.

    uvicorn would keep the connection and the unsent response for as long as the client does.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """Start to watch the connection. Called by asyncio."""
        super().connection_made(transport)
        self._abort_if_idle(None)

    def _abort_if_idle(self, last_state: object) -> None:
        if self not in self.connections:  # the connection has ended
            return
        unsent_bytes = self.transport.get_write_buffer_size()
        state = self.cycle, unsent_bytes
        if state == last_state and (unsent_bytes or self.conn.their_state is h11.IDLE):
            self.transport.abort()
        else:
            self.loop.call_later(IDLE_SECONDS, self._abort_if_idle, state)


class Server(uvicorn.Server):
    """A uvicorn server that drains running requests on shutdown.

    Ends when all running requests have finished, or `drain` seconds after the signal: then the
    remaining requests end with an error.
    """

    def __init__(
        self, app: FastAPI, settings: ServeSettings, on_start: Callable[[str], object]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=IdleTimeoutProtocol,  # h11 limits the size of headers
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.drain) + ABORT_SECONDS,
            )
        )
        self.service: Service = app.state.service
        self.settings = settings
        self.on_start = on_start

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, then call `on_start` with the URL."""
        await super().startup(sockets)
        if self.started:
            address = self.servers[0].sockets[0].getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            self.on_start(f"http://{host}:{address[1]}")

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Refuse new requests and wait for running requests."""
        self.service.is_stopping = True
        log.info("stopping; %d requests are running", self.service.slots.taken)
        loop = asyncio.get_running_loop()
        abort_timer = loop.call_later(self.settings.drain, self.service.abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            abort_timer.cancel()


def run(app: FastAPI, settings: ServeSettings, on_start: Callable[[str], object]) -> None:
    """Serve until a signal ends the process. `on_start` receives the URL."""
    Server(app, settings, on_start).run()
