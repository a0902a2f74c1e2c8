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
        super().__init__(status, message, headers)
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
    """The first of what pydantic found, without what was given: that may be anything."""
    first = found[0]
    param = path(first["loc"][1:])  # behind "body"
    if first["type"] == "extra_forbidden":
        param = ascii(first["loc"][-1])[1:-1][:64]
        message = f"Unrecognized request argument supplied: {param}"
    elif first["loc"] == ("body",):
        message = "send a JSON object, and with it the header Content-Type: application/json"
    elif len({path(one["loc"][1:]) for one in found}) == 1 < len(found):  # none of several types
        message = "; or ".join(dict.fromkeys(one["msg"] for one in found))
    else:
        message = first["msg"].removeprefix("Value error, ")
    known = f"{param}: " if param and param not in message else ""
    return ApiError(400, f"{known}{message}", param=param)


def path(loc: Sequence[int | str]) -> str | None:
    """Where in the body, as in "messages[0].content"; without the types that pydantic tried."""
    parts: list[str] = []
    for part in loc:
        if isinstance(part, int):
            parts.append(f"[{part}]")
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "bool", "float"):
            parts.append(f".{part}")
        else:
            break
    return "".join(parts).removeprefix(".").encode("ascii", "replace").decode() or None
