"""What the benchmarks share: fair turns on a machine that others use too, and keeping results.

All peers take turns in one process, after a run of each that is not counted. Of every run it is
known which share of the machine's processors others had while it lasted, other machines on the
same host included (/proc/stat, less what this process took). Where that is above `ALLOWED` the run
is thrown away and repeated at once, up to `TRIES` times; if none was better, the least disturbed
one counts, and the result says so.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
ALLOWED = 0.05
TRIES = 3


class Run(NamedTuple):
    """One turn of a peer."""

    seconds: float
    result: Any
    others: float  # share of the processors that others had
    rejected: int  # runs thrown away before this one


Peer = Callable[[], tuple[float, Any]]  # seconds, measured by itself, and what came of it


def run_once(peer: Peer) -> Run:
    busy, own, start = machine_seconds(), time.process_time(), time.perf_counter()
    seconds, result = peer()
    wall = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others = machine_seconds() - busy - (time.process_time() - own)
    # The kernel counts in ticks: of a short run a few are no news.
    return Run(seconds, result, max(others - 0.03, 0) / wall, 0)


def run_undisturbed(peer: Peer) -> Run:
    runs = [run_once(peer)]
    while runs[-1].others > ALLOWED and len(runs) < TRIES:
        runs.append(run_once(peer))
    best = min(runs, key=lambda run: run.others)
    return best._replace(rejected=len(runs) - 1)


def take_turns(peers: Mapping[str, Peer], runs: int, *, warm: bool = True) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {name: [] for name in peers}
    for peer in peers.values() if warm else ():
        peer()
    for _ in range(runs):
        for name, peer in peers.items():
            found[name].append(run_undisturbed(peer))
    return found


def machine_seconds() -> float:
    """Processor time taken by anyone since the start of the machine; steal is another machine."""
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def median(runs: Iterable[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def disturbance(found: Mapping[str, Sequence[Run]]) -> str:
    """What the rule above did, in a sentence."""
    runs = [run for each in found.values() for run in each]
    kept = sum(run.others > ALLOWED for run in runs)
    return (
        f"{len(runs)} runs counted, {sum(run.rejected for run in runs)} rejected since others had "
        f"over {ALLOWED:.0%} of the processors, {kept} counted although they had"
    )


def timings(found: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, float]]]:
    """As they are kept in the JSON."""
    return {
        name: [
            {
                "seconds": round(run.seconds, 5),
                "others": round(run.others, 3),
                "rejected": run.rejected,
            }
            for run in runs
        ]
        for name, runs in found.items()
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def circumstances(
    command: str, packages: Sequence[str] = ("torch",), device: str = "cpu"
) -> dict[str, Any]:
    """What someone needs to know to measure the same again."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    gpu = "" if device == "cpu" else f", {torch.cuda.get_device_name(device)}"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpu}",
        "versions": f"python {platform.python_version()}, {', '.join(versions)}",
    }


def bf16_note() -> str:
    """Whether this processor multiplies bf16, without which it is no faster than fp32."""
    info = Path("/proc/cpuinfo").read_text()
    has = "avx512_bf16" in info or "amx_bf16" in info
    return "" if has else "This processor has no bf16 instructions: bf16 is emulated in fp32."


def keep(name: str, report: str, kept: Mapping[str, Any], found: Any) -> None:
    """As results/NAME.json and results/NAME.md."""
    RESULTS.mkdir(exist_ok=True)
    data = {**kept, "found": found}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = "\n".join(f"- {key}: {value}" for key, value in kept.items())
    (RESULTS / f"{name}.md").write_text(f"{report}\n\n{lines}\n")
