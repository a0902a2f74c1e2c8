"""What was measured, as tables for people and as one object for programs."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from llama32.bench.plan import Plan
from llama32.bench.run import Measured
from llama32.bench.turns import disturbance, median


class Table(NamedTuple):
    """A head, whose first field names the rows, and the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_tables(plan: Plan, found: Measured) -> Iterator[RichTable]:
    """The same for a terminal."""
    for head, rows in tables(plan, found):
        if len(head) > 1:
            shown = RichTable(box=None, header_style="bold", pad_edge=False)
            for i, name in enumerate(head):
                shown.add_column(name, justify="right" if i else "left")
            for row in rows:
                shown.add_row(*row)
            yield shown


def tables(plan: Plan, found: Measured) -> list[Table]:
    """Speed, how each form of ours compares with all others, and what it takes."""
    names = list(found.loading)
    return [
        Table(["tokens/s", *names], [[task, *speeds(plan, found, task)] for task in found.runs]),
        *(compared(found, name) for name in names if name.startswith("llama32")),
        Table(["", *names], resources(plan, found)),
    ]


def compared(found: Measured, name: str) -> Table:
    """How many times as fast as each of the others."""
    others = [other for other in found.loading if other != name]
    rows = [[task, *ratios(found, task, name)] for task in found.runs]
    return Table([f"{name}: times as fast as", *others], rows)


def speeds(plan: Plan, found: Measured, task: str) -> list[str]:
    """Tokens per second."""
    seconds = [median(runs) for runs in found.runs[task].values()]
    return [f"{plan.tokens(task) / each:,.1f}" for each in seconds]


def ratios(found: Measured, task: str, name: str) -> list[str]:
    """How many times as fast as each of the others it is: the median over the rounds. The memory of
    a shared machine is faster in one minute than in the next, but within a round nearly the same.
    """
    own = found.runs[task][name]
    others = [runs for other, runs in found.runs[task].items() if other != name]
    rounds = [[b.seconds / a.seconds for a, b in zip(own, x, strict=True)] for x in others]
    return [f"{statistics.median(each):.2f}" for each in rounds]


def resources(plan: Plan, found: Measured) -> list[list[str]]:
    """Memory, how much of its bandwidth is used, and how long it takes to begin."""
    rows = {
        "weights, GB": [f"{of['nbytes'] / 1e9:.2f}" for of in found.loading.values()],
        "peak memory, GB": [f"{peak / 1e9:.2f}" for peak in found.peaks.values()],
        "load, s": [f"{of['load']:.2f}" for of in found.loading.values()],
        "load to first token, s": [f"{of['first']:.2f}" for of in found.loading.values()],
    }
    if 1 in plan.batches:
        steps = [median(runs) for runs in found.runs["decode, batch 1"].values()]
        read = [of["nbytes"] for of in found.loading.values()]
        rates = [nbytes / step for nbytes, step in zip(read, steps, strict=True)]
        rows["weights read in decoding, GB/s"] = [f"{rate / 1e9:.1f}" for rate in rates]
        rows[f"of {found.bandwidth / 1e9:.1f} GB/s that a sum reads"] = [
            f"{rate / found.bandwidth:.0%}" for rate in rates
        ]
    return [[name, *cells] for name, cells in rows.items()]


def facts(plan: Plan, found: Measured) -> dict[str, Any]:
    """All of it, unrounded enough to compute with."""
    return {
        "seconds": {
            task: {name: [round(run.seconds, 5) for run in runs] for name, runs in each.items()}
            for task, each in found.runs.items()
        },
        "tokens": {task: plan.tokens(task) for task in found.runs},
        "loading": found.loading,
        "peak_bytes": found.peaks,
        "read_bytes_per_second": round(found.bandwidth),
        "disturbance": footnote(found),
    }


def footnote(found: Measured) -> str:
    """How fair it was."""
    every = {f"{task} {name}": r for task, each in found.runs.items() for name, r in each.items()}
    return disturbance(every)
