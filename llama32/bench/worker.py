"""Benchmark worker: a backend in a separate process, with threads and memory of its own.

python -m llama32.bench.worker NAME WEIGHT_FORMAT FOLDER, then a JSON request on each line:

    {"method": "decode", "prompts": [[...]], "steps": 32}  ->  {"seconds": s, "others_share": x}
    {"method": "memory"}                                   ->  {"peak": bytes}
"""

import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama32.bench.backends import BACKENDS
from llama32.bench.interleave import run_once


def resident_bytes(key: str) -> int:
    """Return this process's memory now (VmRSS) or at the peak (VmHWM), mapped files included.

    Returns 0 without /proc/self/status.
    """
    status = Path("/proc/self/status")
    match = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else 0


def serve(name: str, weight_format: str, folder: Path) -> None:
    """Load a backend and answer requests until stdin ends."""
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # starts the threads
    start = time.perf_counter()
    backend = BACKENDS[name](folder, weight_format)
    loaded = time.perf_counter() - start
    backend.first_token()
    first = time.perf_counter() - start
    reply({"load": loaded, "first": first, "nbytes": backend.nbytes})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        method = request.pop("method")
        if method == "memory":
            reply({"peak": resident_bytes("VmHWM")})
        else:
            run = run_once(partial(timed_call, getattr(backend, method), request))
            reply({"seconds": run.seconds, "others_share": run.others_share})


def timed_call(method: Callable[..., float], arguments: dict[str, Any]) -> tuple[float, None]:
    """Call a backend method in the form that `run_once` expects."""
    return method(**arguments), None


def reply(message: dict[str, Any]) -> None:
    """Write a JSON line to stdout."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
