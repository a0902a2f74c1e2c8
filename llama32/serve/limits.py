"""Limits for clients: body size, upload time, API key, number of requests."""

import asyncio
import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import Message

from llama32.serve.errors import ApiError

BODY_SECONDS = 30.0  # for a client to send a body
MAX_DISCARDED = 2**28  # bytes of a too large body to read, so that the client gets the error


class JsonRequest(Request):
    """A request with a limited body.

    The body has at most `max_body` bytes, arrives within `BODY_SECONDS`, and is UTF-8 JSON without
    NaN and infinity, nested at most 200 levels deep (a limit of `from_json`).
    """

    max_body: int

    async def body(self) -> bytes:
        """Read the whole body. Raises ApiError 408 or 413."""
        if not hasattr(self, "_body"):
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    self._body = await self._read()
            except TimeoutError:
                # Without closing, uvicorn would wait for the rest of the body forever.
                headers = {"Connection": "close"}
                message = f"the body did not arrive within {BODY_SECONDS:g} seconds"
                raise ApiError(408, message, headers=headers) from None
        return self._body

    async def _read(self) -> bytes:
        chunks, size = [], 0
        async for chunk in self.stream():
            size += len(chunk)
            if size <= self.max_body:
                chunks.append(chunk)
            elif size > MAX_DISCARDED:
                break
        if size > self.max_body:
            raise ApiError(
                413,
                f"the body is too large, allowed: {self.max_body} bytes",
                headers={"Connection": "close"},
            )
        return b"".join(chunks)

    async def json(self) -> Any:
        """Parse the body. Raises ApiError 400 if the body is not valid JSON."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from None


def guarded_route(max_body: int, api_key: str | None = None) -> type[APIRoute]:
    """Return a route class that limits bodies and, with a key, checks the API key first."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def handle_guarded(request: Request) -> Any:
                if api_key is not None:
                    check_key(api_key, request)
                request = JsonRequest(request.scope, request.receive)
                request.max_body = max_body
                return await handle(request)

            return handle_guarded

    return Route


def check_key(api_key: str, request: Request) -> None:
    """Raise ApiError 401 unless the request has the API key.

    Compares in constant time, so that response times reveal nothing about the key.
    """
    scheme, _, client_key = request.headers.get("authorization", "").partition(" ")
    is_equal = hmac.compare_digest(client_key.strip().encode(), api_key.encode())
    if scheme.lower() != "bearer" or not is_equal:
        raise ApiError(
            401,
            "send the right API key, as in: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class RequestSlots:
    """Slots for running and waiting completions.

    A client that finds too few free slots gets an error before the server prepares the request.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    def check(self, count: int) -> None:
        """Raise ApiError unless `count` slots are free.

        Status 400: more than all slots, so a retry is useless. Status 429: not free now.
        """
        if count > self.capacity:
            raise ApiError(
                400, f"the request asks for {count} completions, allowed: {self.capacity}"
            )
        if self.taken + count > self.capacity:
            raise ApiError(
                429,
                "the server has no room for more requests; try again later",
                type="requests",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold `count` slots for the block. Raises ApiError unless the slots are free."""
        self.check(count)
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


async def wait_for_disconnect(receive: Callable[[], Any]) -> None:
    """Return when the client has disconnected. Needs a request whose body is already read."""
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
