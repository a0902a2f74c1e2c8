"""Errors in the shape that OpenAI's API has for them, whoever finds them.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import JSONResponse, Response

INVALID = "invalid_request_error"
LONGEST = 400  # characters of a message: it may quote what was sent


class ApiError(HTTPException):
    """What a client is told. 4xx: it can mend it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        shown = message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
        super().__init__(status, shown, headers)
        self.type = type or (INVALID if status < 500 else "server_error")
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        said = {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}
        return {"error": said}


def respond(error: ApiError) -> Response:
    """As a whole response."""
    return JSONResponse(error.body, error.status_code, error.headers)


def handle_errors(app: FastAPI) -> None:
    """Let every error of this app have that shape."""

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(AnyHTTPException)
    async def told_by_the_framework(_: Request, error: AnyHTTPException) -> Response:
        return respond(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return respond(mistake(error.errors()))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return respond(ApiError(500, "an internal error; the server's log tells more"))


def mistake(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of what pydantic found, without what was given: that may be anything.

    Where a value is of none of several types, that is the type in which most of it was right.
    """
    deepest = max(len(one["loc"]) for one in found if same_value(one, found[0]))
    nearest = [one for one in found if same_value(one, found[0]) and len(one["loc"]) == deepest]
    first = nearest[0]
    param = path(first["loc"])
    if first["type"] == "extra_forbidden":
        param = ascii(first["loc"][-1])[1:-1][:64]
        message = f"Unrecognized request argument supplied: {param}"
    elif first["type"] == "value_error":  # of our own, which says what it is about
        message = first["msg"].removeprefix("Value error, ")
    elif param is None:
        message = "send a JSON object, and with it the header Content-Type: application/json"
    else:
        message = f"{param}: " + "; or ".join(dict.fromkeys(one["msg"] for one in nearest))
    return ApiError(400, message, param=param)


def same_value(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two mistakes are in the same parameter."""
    return one["loc"][:2] == other["loc"][:2]


def path(loc: Sequence[int | str]) -> str | None:
    """Where in the body, as in "messages[0].content"; without the types that pydantic tried."""
    parts: list[str] = []
    for part in loc[1:]:  # behind "body"
        if isinstance(part, int):
            parts.append(f"[{part}]")
        elif part.isidentifier() and part.islower() and part not in TYPES:
            parts.append(f".{part}")
    return "".join(parts).removeprefix(".") or None


TYPES = "str", "int", "bool", "float", "list", "dict"
