"""`llama32 serve` as a process: output, signals, exit."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.commands import error_of, run

LONG = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


@contextmanager
def started(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start the process for the block; yield the process and the URL."""
    command = [sys.executable, "-m", "llama32", "serve", "--port", "0", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stderr
            for line in process.stderr:
                if match := re.search(r"(http://\S+)/v1 for clients", line):
                    yield process, match[1]
                    break
            else:
                pytest.fail("the server did not start")
        finally:
            process.kill()


def wait_for_end(process: subprocess.Popen) -> list[str]:
    """Return the remaining log of a process that a signal ended."""
    _, log = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGTERM), log
    assert "Traceback" not in log
    assert "Abort" not in log
    return log.splitlines()


def test_ctrl_c_lets_running_requests_finish():
    body = {**LONG, "stream": True, "max_tokens": 150}
    with started() as (process, url), httpx.Client(timeout=60) as client:
        assert client.get(f"{url}/health").json() == {"status": "ok"}
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 100
        log = wait_for_end(process)
        assert any("stopping; 1 requests are running" in line for line in log)
        assert any(re.search(r"cmpl-\w+: 5 prompt tokens, .* 150 generated", line) for line in log)
        assert not any("Once upon" in line for line in log)


def test_requests_that_outlast_the_drain_end_with_an_error():
    body = {**LONG, "stream": True}
    with started("--drain", "0.2") as (process, url), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["message"] == "the server is shutting down"
        wait_for_end(process)


def test_a_key_from_the_environment_is_required_and_never_logged():
    with started("--log-prompts", LLAMA32_API_KEY="sesame") as (process, url):
        body = {**LONG, "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        key = {"authorization": "Bearer sesame"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        log = wait_for_end(process)
        assert any("Once upon a time" in line for line in log)
        assert not any("sesame" in line for line in log)


def test_a_port_in_use_is_reported():
    with started() as (_, url):
        port = url.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "llama32", "serve", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode != 0
        assert "address already in use" in second.stderr
        assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "99999"), ("--queue", "-1"), ("--timeout", "0")]
)
def test_impossible_limits_are_refused(option, value):
    result = run("serve", option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_a_key_that_no_header_can_carry_is_refused():
    assert "api_key" in error_of(run("serve", "--api-key", "schlüssel"))
