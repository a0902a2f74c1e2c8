"""What a client may not exceed: the size of a body, the time to send it, the room in the queue."""

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

BODY_SECONDS = 30.0  # to send a body
MOST_DISCARDED = 2**28  # bytes of a body that is too large, read so that the client hears of it


class JsonRequest(Request):
    """A request whose body is read with care: of no more than `limit` bytes, in time, and as JSON
    that is nested at most 200 deep and is UTF-8 throughout."""

    limit: int

    async def body(self) -> bytes:
        """All of it."""
        if not hasattr(self, "_body"):
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    self._body = await self._read()
            except TimeoutError:
                close = {"Connection": "close"}  # or its rest could be waited for, for ever
                raise ApiError(408, "the body did not come in time", headers=close) from None
        return self._body

    async def _read(self) -> bytes:
        chunks, size = [], 0
        async for chunk in self.stream():
            size += len(chunk)
            if size <= self.limit:
                chunks.append(chunk)
            elif size > MOST_DISCARDED:
                break
        if size > self.limit:
            raise ApiError(
                413,
                f"the body has more than {self.limit} bytes, which is the most that is taken",
                headers={"Connection": "close"},
            )
        return b"".join(chunks)

    async def json(self) -> Any:
        """What the body says."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from None


def careful(limit: int, key: str | None = None) -> type[APIRoute]:
    """Routes that read bodies so; where there is a key, of nobody who does not bring it."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def handle_carefully(request: Request) -> Any:
                if key is not None:
                    check_key(key, request)
                request = JsonRequest(request.scope, request.receive)
                request.limit = limit
                return await handle(request)

            return handle_carefully

    return Route


def check_key(expected: str, request: Request) -> None:
    """ApiError unless the request brings the key. How long it takes tells nothing of the key."""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), expected.encode())
    if kind.lower() != "bearer" or not is_right:
        raise ApiError(
            401,
            "send the right API key, as in: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Room:
    """Places for completions, running and waiting. Whoever finds too few is told to come later,
    and costs nothing."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0

    def check(self, wanted: int) -> None:
        """ApiError where so many places are not free now, or could never be."""
        if wanted > self.places:
            raise ApiError(
                400, f"asks for {wanted} completions, and there is room for {self.places}"
            )
        if self.taken + wanted > self.places:
            raise ApiError(
                429,
                "the server has as many requests as it can hold; try again later",
                type="requests",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Hold so many places. ApiError where they are not there."""
        self.check(wanted)
        self.taken += wanted
        try:
            yield
        finally:
            self.taken -= wanted


async def gone(receive: Callable[[], Any]) -> None:
    """Returns when the client has left. The body was read before."""
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
