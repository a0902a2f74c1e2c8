"""Fair turns on a machine that others use too.

All contenders take turns, after a run of each that is not counted. Of every run it is known which
share of the machine's processors others had while it lasted, other machines on the same host
included (/proc/stat, less what this process took). Where that is above `ALLOWED` the run is thrown
away and repeated at once, up to `TRIES` times; if none was better, the least disturbed one counts,
and the result says so.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ALLOWED = 0.05
TRIES = 3


class Run(NamedTuple):
    """One turn of a peer."""

    seconds: float
    result: Any
    others: float  # share of the processors that others had
    rejected: int  # runs thrown away before this one


Peer = Callable[[], tuple[float, Any]]  # seconds, measured by itself, and what came of it
STAT = Path("/proc/stat")  # where there is none, nobody is noticed


def run_once(peer: Peer) -> Run:
    """A turn of a peer that runs in this process."""
    busy, own, start = machine_seconds(), time.process_time(), time.perf_counter()
    seconds, result = peer()
    wall = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others = machine_seconds() - busy - (time.process_time() - own)
    # The kernel counts in ticks: of a short run a few are no news.
    return Run(seconds, result, max(others - 0.03, 0) / wall, 0)


def run_undisturbed(turn: Callable[[], Run]) -> Run:
    """A turn, repeated where others had too much of the machine."""
    runs = [turn()]
    while runs[-1].others > ALLOWED and len(runs) < TRIES:
        runs.append(turn())
    best = min(runs, key=lambda run: run.others)
    return best._replace(rejected=len(runs) - 1)


def take_turns(peers: Mapping[str, Peer], runs: int, *, warm: bool = True) -> dict[str, list[Run]]:
    """So many turns of each peer, in this process."""
    turns = {name: partial(run_once, peer) for name, peer in peers.items()}
    return interleave(turns, runs, warm=warm)


def interleave(
    turns: Mapping[str, Callable[[], Run]], runs: int, *, warm: bool = True
) -> dict[str, list[Run]]:
    """The same for turns that are taken elsewhere."""
    found: dict[str, list[Run]] = {name: [] for name in turns}
    for turn in turns.values() if warm else ():
        turn()
    for _ in range(runs):
        for name, turn in turns.items():
            found[name].append(run_undisturbed(turn))
    return found


def machine_seconds() -> float:
    """Processor time taken by anyone since the start of the machine; steal is another machine."""
    if not STAT.exists():
        return time.process_time()
    user, nice, system, _, _, *rest = STAT.read_text().split("\n")[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def median(runs: Iterable[Run]) -> float:
    """Of their seconds."""
    return statistics.median(run.seconds for run in runs)


def disturbance(found: Mapping[str, Sequence[Run]]) -> str:
    """What the rule above did, in a sentence."""
    runs = [run for each in found.values() for run in each]
    kept = sum(run.others > ALLOWED for run in runs)
    return (
        f"{len(runs)} runs counted, {sum(run.rejected for run in runs)} rejected since others had "
        f"over {ALLOWED:.0%} of the processors, {kept} counted although they had"
    )
