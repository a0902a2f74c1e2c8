"""One contender in a process of its own: nobody shares its threads, and its memory is its own.

python -m llama32.bench.worker NAME FORM FOLDER      then a JSON request on each line

    {"what": "decode", "prompts": [[...]], "steps": 32}    ->  {"seconds": ..., "others": ...}
    {"what": "memory"}                                      ->  {"peak": bytes}
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

from llama32.bench.contenders import KINDS
from llama32.bench.turns import run_once


def resident(key: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM), files that it maps included;
    0 where no kernel tells."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def serve(name: str, form: str, folder: Path) -> None:
    """Load, and do what is asked until there are no more lines."""
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # wakes the threads
    start = time.perf_counter()
    contender = KINDS[name](folder, form)
    loaded = time.perf_counter() - start
    contender.first_token()
    first = time.perf_counter() - start
    reply({"load": loaded, "first": first, "nbytes": contender.nbytes})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        what = request.pop("what")
        if what == "memory":
            reply({"peak": resident("VmHWM")})
        else:
            run = run_once(partial(timed, getattr(contender, what), request))
            reply({"seconds": run.seconds, "others": run.others})


def timed(task: Callable[..., float], of: dict[str, Any]) -> tuple[float, None]:
    """As `run_once` wants it."""
    return task(**of), None


def reply(answer: dict[str, Any]) -> None:
    """One line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
