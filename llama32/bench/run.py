"""Benchmark runner: every backend in a separate process, all in turns, on the same weights."""

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

from llama32.bench.interleave import Run, interleave, median_seconds, run_once
from llama32.bench.plan import Plan

READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Measurements:
    """Results by backend; `runs` by task, then by backend."""

    runs: Mapping[str, Mapping[str, Sequence[Run]]]
    loading: Mapping[str, Mapping[str, float]]  # "load", "first" (token): seconds; "nbytes"
    peaks: Mapping[str, int]  # bytes of memory
    bandwidth: float  # bytes per second read by a sum over memory


class Worker:
    """The process of a backend; the constructor waits until the weights are loaded."""

    def __init__(self, name: str, weight_format: str, folder: Path) -> None:
        command = [sys.executable, "-m", "llama32.bench.worker", name, weight_format, str(folder)]
        self.title = f"{name}, {weight_format}"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loading = self._reply()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method in the worker and return the reply."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def run_task(self, method: str, **arguments: Any) -> Run:
        """Run a backend method in the worker, timed there."""
        reply = self.call(method, **arguments)
        return Run(reply["seconds"], None, reply["others_share"], 0)

    def close(self) -> None:
        """End the process and wait."""
        with self.process:  # closes stdin, which ends the worker, and waits
            pass

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise ValueError(
                f"the process of {self.title} ended with exit code {self.process.returncode}"
            )
        return json.loads(line)


@contextmanager
def workers(plan: Plan) -> Iterator[dict[str, Worker]]:
    """Load all backends one after the other; on exit, end all processes, also after errors."""
    with ExitStack() as stack:
        gguf = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llama32-bench-")))
        started: dict[str, Worker] = {}
        for name, weight_format in plan.backends:
            folder = plan.folder
            if name == "llama.cpp":
                from llama32.bench.gguf_writer import write_gguf

                plan.on_progress(f"writing {weight_format}.gguf")
                write_gguf(folder, gguf / f"{weight_format}.gguf", weight_format)
                folder = gguf
            title = f"{name}, {weight_format}"
            plan.on_progress(f"loading {title}")
            started[title] = Worker(name, weight_format, folder)
            stack.callback(started[title].close)
        yield started


def measure(plan: Plan) -> Measurements:
    """Run a plan: interleave the backends of each task with a read of memory."""
    runs: dict[str, dict[str, list[Run]]] = {}
    memory = torch.ones(READ_BYTES // 4)
    with workers(plan) as started:
        for task, call in plan.tasks.items():
            plan.on_progress(task)
            calls = {name: partial(worker.run_task, **call) for name, worker in started.items()}
            calls["memory"] = partial(run_once, partial(read_memory, memory))
            runs[task] = interleave(calls, plan.runs)
        loading = {name: worker.loading for name, worker in started.items()}
        peaks = {name: int(worker.call("memory")["peak"]) for name, worker in started.items()}
    reads = [median_seconds(by_backend.pop("memory")) for by_backend in runs.values()]
    return Measurements(runs, loading, peaks, READ_BYTES / statistics.median(reads))


def read_memory(memory: torch.Tensor) -> tuple[float, None]:
    """Time a sum over a tensor."""
    start = time.perf_counter()
    memory.sum()
    return time.perf_counter() - start, None
