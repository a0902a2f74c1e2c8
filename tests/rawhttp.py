"""HTTP as bytes on a socket, for all that no client library would send, or leave undone."""

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
    """A response, read to its end."""

    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What is wrong."""
        assert self.status >= 400, self.body
        assert self.headers["content-type"] == "application/json"
        return checked_error(self.body)

    @property
    def events(self) -> list[str]:
        """Of a stream."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, rest = self.body.decode().split("\n\n")
        assert not rest, "the stream breaks off in an event"
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]

    @property
    def text(self) -> str:
        """Of the one choice, whole or streamed."""
        assert self.status == 200, self.body
        if self.headers["content-type"] == "application/json":
            (choice,) = self.json["choices"]
            return choice["message"]["content"] if "message" in choice else choice["text"]
        *events, done = self.events
        assert done == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def checked_error(told: str | bytes) -> dict[str, Any]:
    """What is wrong, in OpenAI's shape, and with no more of what was sent than it takes to find it
    there."""
    whole = json.loads(told)
    assert whole.keys() == {"error"}
    error = whole["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 400
    assert len(str(error["param"])) < 100
    return error


class Wire:
    """One connection to a server on this machine."""

    def __init__(self, port: int, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(60)
        if buffer is not None:  # bytes that come unread
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
        """Close it as a machine does that crashes: what was sent is not waited for."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def post(self, path: str, body: Any, headers: Mapping[str, str] = JSON) -> None:
        """Send a whole request; what is not bytes becomes JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(head("POST", path, {**headers, "Content-Length": f"{len(body)}"}) + body)

    def answer(self) -> Answer:
        """The next response, to its end."""
        status, headers = self.begin()
        return Answer(status, headers, b"".join(self.pieces(headers)))

    def begin(self) -> tuple[int, HTTPMessage]:
        """Status and headers of the next response."""
        line = self.file.readline()
        if not line:
            raise ConnectionResetError("there is no answer")
        return int(line.split()[1]), parse_headers(self.file)

    def pieces(self, headers: HTTPMessage) -> Iterator[bytes]:
        """The body as it comes."""
        if headers["transfer-encoding"] != "chunked":
            yield self.file.read(int(headers["content-length"] or -1))
            return
        while size := int(self.file.readline() or b"-1", 16):
            assert size > 0, "the connection broke in mid-stream"
            yield self.file.read(size)
            self.file.readline()
        self.file.readline()

    def is_closed(self) -> bool:
        """Whether the server has ended it; waits for that."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """Of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: here", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def ask(port: int, path: str, body: Any, headers: Mapping[str, str] = JSON) -> Answer:
    """POST, on a connection of its own."""
    with Wire(port) as wire:
        wire.post(path, body, headers)
        return wire.answer()


def get(port: int, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    """GET, likewise."""
    with Wire(port) as wire:
        wire.send(head("GET", path, headers or {}))
        return wire.answer()
