"""HTTP as bytes on a socket, for requests that no client library would send."""

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPMessage, parse_headers
from typing import Any

JSON = {"Content-Type": "application/json"}


@dataclass
class Answer:
    """A complete response."""

    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a refusal, with its shape checked."""
        assert self.status >= 400, self.body
        assert self.headers["content-type"] == "application/json"
        return checked_error(self.body)

    @property
    def events(self) -> list[str]:
        """Data of all events of a stream."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, rest = self.body.decode().split("\n\n")
        assert not rest, "the stream ends inside an event"
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]

    @property
    def text(self) -> str:
        """Text of the only choice, whole or streamed."""
        assert self.status == 200, self.body
        if self.headers["content-type"] == "application/json":
            (choice,) = self.json["choices"]
            return choice["message"]["content"] if "message" in choice else choice["text"]
        *events, done = self.events
        assert done == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def checked_error(body: str | bytes) -> dict[str, Any]:
    """Return an error after checking OpenAI's shape and that the error quotes little."""
    fields = json.loads(body)
    assert fields.keys() == {"error"}
    error = fields["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 400
    assert len(str(error["param"])) < 100
    return error


class Wire:
    """A connection to a server on this machine."""

    def __init__(self, port: int, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(60)
        if buffer is not None:  # bytes to receive before the first read
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect(("127.0.0.1", port))
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def reset(self) -> None:
        """Close with a reset, like a machine that crashes; unsent data is lost."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def post(self, path: str, body: Any, headers: Mapping[str, str] = JSON) -> None:
        """Send a complete request. A body other than bytes becomes JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(head("POST", path, {**headers, "Content-Length": f"{len(body)}"}) + body)

    def answer(self) -> Answer:
        """Read the next response."""
        status, headers = self.begin()
        return Answer(status, headers, b"".join(self.pieces(headers)))

    def begin(self) -> tuple[int, HTTPMessage]:
        """Read status and headers of the next response."""
        line = self.file.readline()
        if not line:
            raise ConnectionResetError("the server sent no response")
        return int(line.split()[1]), parse_headers(self.file)

    def pieces(self, headers: HTTPMessage) -> Iterator[bytes]:
        """Yield the body as it arrives."""
        if headers["transfer-encoding"] != "chunked":
            yield self.file.read(int(headers["content-length"] or -1))
            return
        while size := int(self.file.readline() or b"-1", 16):
            assert size > 0, "the connection closed inside the stream"
            yield self.file.read(size)
            self.file.readline()
        self.file.readline()

    def is_closed(self) -> bool:
        """Wait for the server to close the connection."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: here", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def ask(port: int, path: str, body: Any, headers: Mapping[str, str] = JSON) -> Answer:
    """Send a POST request on a new connection."""
    with Wire(port) as wire:
        wire.post(path, body, headers)
        return wire.answer()


def get(port: int, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Send a GET request on a new connection."""
    with Wire(port) as wire:
        wire.send(head("GET", path, headers or {}))
        return wire.answer()
