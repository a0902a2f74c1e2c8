"""Interleaved timing on a shared machine.

All backends take turns, after an uncounted warm-up run of each, so slow minutes of the machine hit
all alike. Every run records other processes' share of the processors, virtual machines on the same
host included (/proc/stat minus the current process). A run with a share above `MAX_OTHERS_SHARE` is
rejected and repeated at once, at most `TRIES` runs in all; if every run is disturbed, the least
disturbed run counts, and the result says so.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

MAX_OTHERS_SHARE = 0.05
TRIES = 3


class Run(NamedTuple):
    """One timed run."""

    seconds: float
    result: Any
    others_share: float  # other processes' share of the processors during the run
    rejected: int  # runs rejected before this run


TimedCall = Callable[[], tuple[float, Any]]  # returns its own timing in seconds, and a result
PROC_STAT = Path("/proc/stat")  # without the file, other processes' share counts as 0


def run_once(call: TimedCall) -> Run:
    """Run a timed call here, and measure the share of other processes meanwhile."""
    busy, own, start = machine_seconds(), time.process_time(), time.perf_counter()
    seconds, result = call()
    wall = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others_busy = machine_seconds() - busy - (time.process_time() - own)
    # The kernel counts in ticks of about 10 ms: a few are within the error of a short run.
    return Run(seconds, result, max(others_busy - 0.03, 0) / wall, 0)


def run_undisturbed(run: Callable[[], Run]) -> Run:
    """Run, and repeat while other processes' share is too high, at most `TRIES` runs in all."""
    runs = [run()]
    while runs[-1].others_share > MAX_OTHERS_SHARE and len(runs) < TRIES:
        runs.append(run())
    best = min(runs, key=lambda each: each.others_share)
    return best._replace(rejected=len(runs) - 1)


def interleave_in_process(
    calls: Mapping[str, TimedCall], runs: int, *, warm: bool = True
) -> dict[str, list[Run]]:
    """Run timed calls in turns, in the current process, `runs` times each."""
    runs_by_name = {name: partial(run_once, call) for name, call in calls.items()}
    return interleave(runs_by_name, runs, warm=warm)


def interleave(
    runs_by_name: Mapping[str, Callable[[], Run]], runs: int, *, warm: bool = True
) -> dict[str, list[Run]]:
    """Run callables in turns, `runs` times each, after an uncounted run of each if `warm`."""
    results: dict[str, list[Run]] = {name: [] for name in runs_by_name}
    for run in runs_by_name.values() if warm else ():
        run()
    for _ in range(runs):
        for name, run in runs_by_name.items():
            results[name].append(run_undisturbed(run))
    return results


def machine_seconds() -> float:
    """Return the processor time used since boot by all processes, and by other virtual machines.

    The last counts as "steal" in /proc/stat. Without /proc/stat, only this process is counted.
    """
    if not PROC_STAT.exists():
        return time.process_time()
    user, nice, system, _, _, *rest = PROC_STAT.read_text().split("\n")[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def median_seconds(runs: Iterable[Run]) -> float:
    """Return the median of the seconds of runs."""
    return statistics.median(run.seconds for run in runs)


def disturbance(results: Mapping[str, Sequence[Run]]) -> str:
    """Describe in a sentence how many runs were rejected, and how many disturbed runs counted."""
    runs = [run for each in results.values() for run in each]
    disturbed = sum(run.others_share > MAX_OTHERS_SHARE for run in runs)
    return (
        f"{len(runs)} runs counted, {sum(run.rejected for run in runs)} rejected because other "
        f"processes used over {MAX_OTHERS_SHARE:.0%} of the processors, {disturbed} of the counted "
        "runs disturbed as well"
    )
