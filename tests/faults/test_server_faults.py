"""Bad clients and failing models: the server answers or refuses in OpenAI's shape.

After each test, the server is idle and gives a good request the same answer as before.
"""

import json
import logging
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from threading import Event
from typing import Any

import pytest
import torch

from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.serve import limits
from tests.rawhttp import JSON, Wire, ask, checked_error, get, head
from tests.serving import COMPLETE, HELLO, Served, assert_unharmed, serving, until

CHAT = "/v1/chat/completions"
LONG = HELLO | {"max_tokens": 900, "ignore_eos": True}
STREAM = LONG | {"stream": True}
MB = 2**20


@pytest.fixture(autouse=True)
def unharmed(served, hello) -> Iterator[None]:
    yield
    assert_unharmed(served, hello)


@contextmanager
def own_server(
    llm: LLM, hello: str, max_running: int = 64, cache_tokens: int = 8192, **settings: Any
) -> Iterator[Served]:
    """Run another server with the same model."""
    engine = EngineSettings(cache_tokens=cache_tokens, max_running=max_running)
    with serving(replace(llm, engine_settings=engine), **settings) as server:
        yield server
        assert_unharmed(server, hello)


@contextmanager
def wires(served: Served, *bodies: dict[str, Any]) -> Iterator[list[Wire]]:
    """Send each body on a connection of its own, once the one before has its slots."""
    with ExitStack() as stack:
        opened = [stack.enter_context(Wire(served.port)) for _ in bodies]
        for i, (wire, body) in enumerate(zip(opened, bodies, strict=True)):
            wire.post(COMPLETE, body)
            until(lambda count=i + 1: served.service.slots.taken == count)
        yield opened


@contextmanager
def hooked(llm: LLM, on_call: Callable[[int], object]) -> Iterator[None]:
    """Call `on_call` with the number of each model call before the call, in the engine thread."""
    calls = count()

    def before(*_: object) -> None:
        on_call(next(calls))

    handle = llm.model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def halted(llm: LLM, after: int = 0) -> Iterator[None]:
    """Block the model after `after` calls, until the end of the block."""
    end = Event()
    with hooked(llm, lambda number: number < after or end.wait(30)):
        try:
            yield
        finally:
            end.set()


# Bytes


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_refused_and_not_stored(served, chunked):
    length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": f"{100 * MB}"}
    megabyte = b"%x\r\n%s\r\n" % (MB, b" " * MB) if chunked else b" " * MB
    tracemalloc.start()
    try:
        with Wire(served.port) as wire:
            wire.send(head("POST", CHAT, JSON | length))
            for _ in range(100):
                wire.send(megabyte)
            wire.send(b"0\r\n\r\n" * chunked)
            answer = wire.answer()
            assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")
            assert wire.is_closed()
        assert tracemalloc.get_traced_memory()[1] < 24 * MB
    finally:
        tracemalloc.stop()


def test_an_endless_body_is_not_read_forever(served, monkeypatch):
    monkeypatch.setattr(limits, "MAX_DISCARDED", 16 * MB)
    megabyte = b"%x\r\n%s\r\n" % (MB, b" " * MB)
    with Wire(served.port) as wire:
        wire.send(head("POST", CHAT, JSON | {"Transfer-Encoding": "chunked"}))
        with pytest.raises(ConnectionError):
            wire.send(megabyte * 100)


def test_a_slow_body_times_out_and_delays_no_other_request(served, hello, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 1)
    with Wire(served.port) as slow, Wire(served.port) as cut, Wire(served.port) as silent:
        silent.send(b"POST")
        cut.send(head("POST", CHAT, JSON | {"Content-Length": "100"}) + b'{"model": ')
        cut.close()
        slow.send(head("POST", CHAT, JSON | {"Content-Length": "100"}))
        for letter in b'{"mod':
            slow.send(bytes([letter]))
        assert ask(served.port, COMPLETE, HELLO).text == hello
        answer = slow.answer()
        assert (answer.status, answer.error["type"]) == (408, "invalid_request_error")
        slow.socket.settimeout(3)  # immediately, not because of the idle timeout
        assert slow.is_closed()


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,  # TLS
        b"GET /" + b"a" * 200_000,  # an endless line
        b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"a" * 200_000,
        b"GET / HTTP/1.1\r\nHost: here\r\n" + b"X: a\r\n" * 50_000,
        b"GET / HTTP/1.1\r\n\r\n",
        head("GET", "/\xff", {}),
        head("POST", CHAT, JSON | {"Content-Length": "-1"}),
        head("POST", CHAT, JSON | {"Content-Length": "1" * 30}),
        head("POST", CHAT, JSON | {"Transfer-Encoding": "gzip"}),
        head("POST", CHAT, JSON | {"Transfer-Encoding": "chunked"}) + b"zz\r\n",
    ],
    ids=lambda sent: ascii(sent[-24:]),
)
def test_invalid_http_is_refused_and_the_connection_closes(served, sent):
    with Wire(served.port) as wire:
        try:
            wire.send(sent)
            assert wire.answer().status == 400
        except ConnectionError:
            return  # the server closed the connection during the upload
        assert wire.is_closed()


@pytest.mark.parametrize(
    "path", ["/no", "/v1/models/%00", "/v1/models/../../etc/passwd", "//", "/%ff", CHAT + "/", "*"]
)
def test_an_unknown_path_is_refused_in_the_right_shape(served, path):
    with Wire(served.port) as wire:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
            wire.send(head(method, path, {}))
            answer = wire.answer()
            assert answer.status in (404, 405, 307)
            assert answer.status == 307 or answer.error["type"] == "invalid_request_error"


def test_a_connection_survives_errors(served, hello):
    bodies = [b"{", b"[]", json.dumps(HELLO).encode(), b"", json.dumps(HELLO).encode()]
    with Wire(served.port) as wire:
        for body in bodies:
            wire.post(COMPLETE, body)  # all before the first answer
        answers = [wire.answer() for _ in bodies]
    assert [answer.status for answer in answers] == [400, 400, 200, 400, 200]
    assert answers[2].text == answers[4].text == hello


# Clients


def leave_by_close(wire: Wire) -> None:
    wire.close()


def leave_by_reset(wire: Wire) -> None:
    wire.reset()


def leave_by_half(wire: Wire) -> None:
    """Close for sending. The server cannot know whether the client still reads."""
    wire.socket.shutdown(socket.SHUT_WR)
    while wire.socket.recv(2**16):
        pass


LEAVES = [leave_by_close, leave_by_reset, leave_by_half]


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token_aborts_the_request(served, llm, leave, stream):
    generated = served.engine.stats.generated
    with halted(llm), wires(served, LONG | {"stream": stream}) as (wire,):
        until(lambda: served.engine.is_busy)
        leave(wire)
        until(lambda: not served.service.slots.taken)
    served.assert_idle()
    assert served.engine.stats.generated <= generated + 1


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_during_the_answer_aborts_the_request(served, llm, leave, stream):
    generated = served.engine.stats.generated
    with halted(llm, after=10), wires(served, LONG | {"stream": stream}) as (wire,):
        if stream:
            _, headers = wire.begin()
            assert next(wire.pieces(headers)).startswith(b"data: {")
        until(lambda: any(len(request.output) > 5 for request in served.engine.scheduler.running))
        leave(wire)
        until(lambda: not served.service.slots.taken)
    served.assert_idle()
    assert served.engine.stats.generated < generated + 20


def test_a_disconnect_removes_a_waiting_request(llm, served, hello):
    with own_server(llm, hello, max_running=1) as server, halted(llm, after=5):
        bodies = [LONG | {"stream": i % 2 == 0} for i in range(7)]
        with wires(server, *bodies) as (_, *waiting):
            for i, wire in enumerate(waiting):
                LEAVES[i % 3](wire)
            until(lambda: server.service.slots.taken == 1)


KILLED = """
import socket, sys
wires = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(30)]
for wire in wires:
    wire.sendall(sys.argv[2].encode())
for wire in wires:
    assert b"200 OK" in wire.recv(100)
print("all run", flush=True)
sys.stdin.read()
"""


def test_thirty_streams_of_a_killed_client_are_aborted(served):
    body = json.dumps(STREAM)
    sent = head("POST", COMPLETE, JSON | {"Content-Length": f"{len(body)}"}).decode() + body
    command = [sys.executable, "-c", KILLED, f"{served.port}", sent]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "all run\n"
            assert served.service.slots.taken == 30
        finally:
            process.kill()
    served.assert_idle()


@contextmanager
def unread(served: Served) -> Iterator[Wire]:
    """Request an answer longer than all buffers, and do not read the answer."""
    (listening,) = served.server.servers[0].sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with Wire(served.port, buffer=4096) as wire:
        wire.post(COMPLETE, STREAM | {"max_tokens": 100, "n": 2, "logprobs": 20})
        yield wire


@pytest.mark.parametrize("leaves", [True, False])
def test_an_unread_answer_delays_no_other_request_and_times_out(llm, hello, leaves):
    timeout = 600.0 if leaves else 6.0
    with own_server(llm, hello, timeout=timeout) as server, unread(server) as wire:
        until(lambda: server.engine.stats.generated >= 200)
        assert server.service.slots.taken == 2
        assert ask(server.port, COMPLETE, HELLO).text == hello
        if leaves:
            wire.close()
        server.assert_idle()


def test_a_connection_with_an_unread_answer_is_closed(llm, hello, monkeypatch):
    monkeypatch.setattr("llama32.serve.server.IDLE_SECONDS", 0.3)
    with own_server(llm, hello) as server, unread(server):
        until(lambda: server.engine.stats.generated)
        until(lambda: not server.server.server_state.connections)


@pytest.mark.parametrize("sent", [b"", b"POST /v1", head("GET", "/health", {}) + b"GET /"])
def test_an_idle_connection_is_closed(served, monkeypatch, sent):
    monkeypatch.setattr("llama32.serve.server.IDLE_SECONDS", 0.3)
    with Wire(served.port) as wire:
        wire.send(sent)
        assert not sent.endswith(b"GET /") or wire.answer().status == 200
        wire.socket.settimeout(3)
        assert wire.is_closed()


# Limits


def test_requests_beyond_the_queue_get_status_429(llm, served, hello):
    bodies = [
        HELLO | {"prompt": text, "max_tokens": 8, "temperature": 1, "seed": 1, "stream": True}
        for text in ("Once", "One day", "The cat")
    ]
    expected = [ask(served.port, COMPLETE, body).text for body in bodies]
    with own_server(llm, hello, max_running=2, queue=1) as server, ExitStack() as stack:
        with halted(llm, after=3):
            opened = stack.enter_context(wires(server, *bodies))
            answer = ask(server.port, COMPLETE, HELLO)
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert answer.error["code"] == "rate_limit_exceeded"
            answer = ask(server.port, COMPLETE, HELLO | {"n": 4})
            assert (answer.status, "allowed: 3" in answer.error["message"]) == (400, True)
            assert get(server.port, "/health").status == 200
        assert [wire.answer().text for wire in opened] == expected


def test_a_request_without_a_free_slot_is_refused_before_preparation(
    llm, served, hello, monkeypatch
):
    """The server does not even tokenize the prompt."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    with (
        own_server(llm, hello, max_running=1, queue=0) as server,
        halted(llm),
        wires(server, LONG),
        monkeypatch.context() as patch,
    ):
        patch.setattr(server.service, "run_in_thread", None)
        for path, body in ((COMPLETE, HELLO), (CHAT, chat)):
            assert ask(server.port, path, body).status == 429
            assert ask(server.port, path, body | {"n": 2}).status == 400


@pytest.mark.parametrize("after", [0, 6])
@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_request_ends_with_an_error(llm, served, hello, after, stream):
    with own_server(llm, hello, timeout=1.0) as server:
        with halted(llm, after):
            answer = ask(server.port, COMPLETE, LONG | {"stream": stream})
        if stream and after:
            assert len(answer.events) > 1
            error = checked_error(answer.events[-1])
        else:
            assert answer.status == 504
            error = answer.error
        assert "longer than this server allows" in error["message"]


# The model


@pytest.mark.parametrize("failing_call", [2, 8])
def test_a_failing_model_ends_all_requests_and_fails_the_health_check(llm, served, failing_call):
    def fail(number: int) -> None:
        if number == 0:
            until(lambda: served.service.slots.taken == 4)
        if number == failing_call:
            raise RuntimeError("out of memory")

    with hooked(llm, fail), ExitStack() as stack:
        opened = [stack.enter_context(Wire(served.port)) for _ in range(4)]
        for i, wire in enumerate(opened):
            wire.post(COMPLETE, LONG | {"stream": i > 0})
        answers = [wire.answer() for wire in opened]
    assert answers[0].status == 500
    for answer in answers:
        error = answer.error if answer.status == 500 else checked_error(answer.events[-1])
        assert error["type"] == "server_error"
        assert "out of memory" in error["message"]
    health = get(served.port, "/health")
    assert (health.status, health.json["status"]) == (503, "failing")
    assert "out of memory" in health.json["error"]
    assert ask(served.port, COMPLETE, HELLO).status == 200
    assert get(served.port, "/health").json == {"status": "ok"}


@contextmanager
def nan_embeddings(llm: LLM) -> Iterator[set[int]]:
    """Yield a set of token ids; their embeddings are NaN while in the set."""
    nan_ids = {7}

    def insert_nan(_: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        is_nan = torch.isin(inputs[0], torch.tensor([*nan_ids], dtype=torch.long))
        return torch.where(is_nan[..., None], torch.nan, embedded)

    handle = llm.model.embed.register_forward_hook(insert_nan)
    try:
        yield nan_ids
    finally:
        handle.remove()


def test_a_request_with_nan_logits_fails_alone(llm, served, hello):
    """Later requests that reuse the pages are not affected."""
    with own_server(llm, hello, cache_tokens=1024) as server, nan_embeddings(llm):
        for number in range(3):
            with wires(server, HELLO) as (good,):
                body = HELLO | {"prompt": [number, *range(100, 200), 7, 7]}
                answer = ask(server.port, COMPLETE, body)
                assert (answer.status, answer.error["type"]) == (500, "server_error")
                assert good.answer().text == hello
        assert get(server.port, "/health").status == 200
        all_pages = {"prompt": [9] * 1010, "max_tokens": 14, "ignore_eos": True}
        assert ask(server.port, COMPLETE, HELLO | all_pages).status == 200


def test_pages_with_nan_are_not_reused(llm, served):
    prompt = [7, *range(100, 250)]
    with nan_embeddings(llm) as nan_ids:
        assert ask(served.port, COMPLETE, HELLO | {"prompt": prompt}).status == 500
        nan_ids.clear()
        assert ask(served.port, COMPLETE, HELLO | {"prompt": prompt}).status == 200


# Access and logs


def test_without_the_key_only_health_and_the_page_are_open(llm, served, hello):
    with own_server(llm, hello, api_key="sesame") as server:
        operations = [
            (method.upper(), path)
            for path, methods in server.server.config.app.openapi()["paths"].items()
            for method in methods
            if path != "/health"
        ]
        assert len(operations) >= 8
        for method, path in operations:
            for key in ("", "Bearer", "Bearer wrong", "Basic sesame", "Bearer \xff", "sesame"):
                headers = JSON | {"Authorization": key, "Content-Length": "1"}
                with Wire(server.port) as wire:
                    wire.send(head(method, path, headers) + b"{")
                    answer = wire.answer()
                assert (answer.status, path) == (401, path)
                assert answer.error["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "bearer  sesame"}
        assert get(server.port, "/v1/models").status == 401
        assert get(server.port, "/v1/models", right).status == 200
        assert get(server.port, "/").status == get(server.port, "/health").status == 200


def test_without_the_key_the_body_is_not_read(llm, served, hello):
    with own_server(llm, hello, api_key="sesame") as server, Wire(server.port) as wire:
        wire.send(head("POST", CHAT, JSON | {"Content-Length": f"{100 * MB}"}))
        assert wire.answer().status == 401


def test_only_listed_sites_pass_cors(llm, served, hello):
    site, other = {"Origin": "https://good.example"}, {"Origin": "https://evil.example"}
    preflight = {"Access-Control-Request-Method": "POST"}
    with own_server(llm, hello, cors_origin=["https://good.example"]) as server:
        for port, origin, allowed in (
            (served.port, site, None),
            (served.port, other, None),
            (server.port, site, site["Origin"]),
            (server.port, other, None),
        ):
            with Wire(port) as wire:
                wire.send(head("OPTIONS", CHAT, origin | preflight))
                answers = [wire.answer(), get(port, "/health", origin), ask(port, CHAT, {}, origin)]
            for answer in answers:
                assert answer.headers["access-control-allow-origin"] == allowed


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_texts_only_with_log_prompts(llm, served, hello, caplog, log_prompts):
    body = HELLO | {"prompt": "The xylophone", "max_tokens": 9}
    with own_server(llm, hello, log_prompts=log_prompts) as server, caplog.at_level(logging.INFO):
        answer = ask(server.port, COMPLETE, body).text
        for wrong in ({"model": "xylophone"}, {"stop": [["xylophone"]]}, {"xylophone": 1}):
            assert ask(server.port, COMPLETE, body | wrong).error
    assert "9 generated" in caplog.text
    assert (answer in caplog.text) == ("xylophone" in caplog.text) == log_prompts
