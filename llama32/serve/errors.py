"""Errors in the shape of OpenAI's API, whether llama32, FastAPI or pydantic raised them.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response

INVALID_REQUEST = "invalid_request_error"
MAX_MESSAGE_CHARS = 400  # a message may quote the request


class ApiError(HTTPException):
    """An error for the client. Status 4xx: the client can correct the request."""

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
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[: MAX_MESSAGE_CHARS - 3]}..."
        super().__init__(status, message, headers)
        self.type = type or (INVALID_REQUEST if status < 500 else "server_error")
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        fields = {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


def error_response(error: ApiError) -> Response:
    """Return the HTTP response for an error."""
    return JSONResponse(error.body, error.status_code, error.headers)


def handle_errors(app: FastAPI) -> None:
    """Install handlers that return every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(Exception)
    async def internal_error(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "internal error; see the server's log"))


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return an error for the first parameter that pydantic rejected.

    The message never quotes the value, which may be huge. If the value matches no type of a union,
    the message is about the types that matched to the greatest depth.
    """
    candidates = [error for error in errors if in_same_parameter(error, errors[0])]
    depth = max(len(error["loc"]) for error in candidates)
    deepest = [error for error in candidates if len(error["loc"]) == depth]
    first = deepest[0]
    param = parameter_path(first["loc"])
    if first["type"] == "extra_forbidden":
        param = ascii(first["loc"][-1])[1:-1][:64]
        message = f"Unrecognized request argument supplied: {param}"
    elif first["type"] == "value_error":  # raised by a validator of this package
        message = first["msg"].removeprefix("Value error, ")
    elif param is None:
        message = "send a JSON object with the header Content-Type: application/json"
    else:
        messages = dict.fromkeys(error["msg"] for error in deepest)
        message = f"{param}: " + "; or ".join(messages)
    return ApiError(400, message, param=param)


def in_same_parameter(error: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if two validation errors are in the same parameter."""
    return error["loc"][:2] == other["loc"][:2]


def parameter_path(loc: Sequence[int | str]) -> str | None:
    """Return the path of a parameter, like "messages[0].content".

    Leaves out the types of a union that pydantic tried.
    """
    parts: list[str] = []
    for part in loc[1:]:  # after "body"
        if isinstance(part, int):
            parts.append(f"[{part}]")
        elif part.isidentifier() and part.islower() and part not in PYDANTIC_TYPES:
            parts.append(f".{part}")
    return "".join(parts).removeprefix(".") or None


PYDANTIC_TYPES = "str", "int", "bool", "float", "list", "dict"
