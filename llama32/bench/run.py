"""All contenders in turns, each in a process of its own, on the same weights."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama32.bench.plan import Plan
from llama32.bench.turns import Run, interleave, median, run_once

READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Measured:
    """By contender, and of `runs` first by task."""

    runs: Mapping[str, Mapping[str, Sequence[Run]]]
    loading: Mapping[str, Mapping[str, float]]  # seconds to load, to the first token; weight bytes
    peaks: Mapping[str, int]  # bytes
    bandwidth: float  # bytes per second that a sum over memory reads


class Worker:
    """A contender's process. It is loaded when this is made."""

    def __init__(self, name: str, form: str, folder: Path) -> None:
        command = [sys.executable, "-m", "llama32.bench.worker", name, form, str(folder)]
        self.title = f"{name}, {form}"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loading = self._answer()

    def ask(self, what: str, **of: Any) -> dict[str, Any]:
        """What the worker answers."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"what": what, **of}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def turn(self, what: str, **of: Any) -> Run:
        """A run there."""
        answer = self.ask(what, **of)
        return Run(answer["seconds"], None, answer["others"], 0)

    def close(self) -> None:
        """End it."""
        with self.process:  # closes what leads there, and waits
            pass

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise ValueError(f"the process of {self.title} ended with {self.process.returncode}")
        return json.loads(line)


@contextmanager
def workers(plan: Plan) -> Iterator[dict[str, Worker]]:
    """All contenders, loaded one after the other; ended afterwards, come what may."""
    with ExitStack() as stack:
        gguf = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llama32-bench-")))
        started: dict[str, Worker] = {}
        for name, form in plan.contenders:
            folder = plan.folder
            if name == "llama.cpp":
                from llama32.bench.gguf import write_gguf

                plan.tell(f"writing {form}.gguf")
                write_gguf(folder, gguf / f"{form}.gguf", form)
                folder = gguf
            plan.tell(f"loading {name}, {form}")
            started[f"{name}, {form}"] = Worker(name, form, folder)
            stack.callback(started[f"{name}, {form}"].close)
        yield started


def measure(plan: Plan) -> Measured:
    """Everything, each task in turns with reading memory."""
    runs: dict[str, dict[str, list[Run]]] = {}
    memory = torch.ones(READ_BYTES // 4)
    with workers(plan) as started:
        for task, asked in plan.tasks.items():
            plan.tell(task)
            turns = {name: partial(one.turn, **asked) for name, one in started.items()}
            turns["memory"] = partial(run_once, partial(read, memory))
            runs[task] = interleave(turns, plan.runs)
        loading = {name: one.loading for name, one in started.items()}
        peaks = {name: int(one.ask("memory")["peak"]) for name, one in started.items()}
    reads = [median(found.pop("memory")) for found in runs.values()]
    return Measured(runs, loading, peaks, READ_BYTES / statistics.median(reads))


def read(memory: torch.Tensor) -> tuple[float, None]:
    """All of it."""
    start = time.perf_counter()
    memory.sum()
    return time.perf_counter() - start, None
