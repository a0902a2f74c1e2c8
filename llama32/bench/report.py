"""Benchmark reports: Markdown and terminal tables, and a dict for JSON."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from llama32.bench.interleave import disturbance, median_seconds
from llama32.bench.plan import Plan
from llama32.bench.run import Measurements


class Table(NamedTuple):
    """A table of text: the head and rows; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_tables(plan: Plan, results: Measurements) -> Iterator[RichTable]:
    """Yield the tables for a terminal; tables without a second column are left out."""
    for head, rows in tables(plan, results):
        if len(head) > 1:
            table = RichTable(box=None, header_style="bold", pad_edge=False)
            for i, name in enumerate(head):
                table.add_column(name, justify="right" if i else "left")
            for row in rows:
                table.add_row(*row)
            yield table


def tables(plan: Plan, results: Measurements) -> list[Table]:
    """Return tables of speed, of llama32 relative to every other backend, and of resources."""
    names = list(results.loading)
    return [
        Table(
            ["tokens/s", *names], [[task, *speeds(plan, results, task)] for task in results.runs]
        ),
        *(comparison(results, name) for name in names if name.startswith("llama32")),
        Table(["", *names], resources(plan, results)),
    ]


def comparison(results: Measurements, name: str) -> Table:
    """Return how many times as fast a backend is as every other backend, by task."""
    peers = [peer for peer in results.loading if peer != name]
    rows = [[task, *ratios(results, task, name)] for task in results.runs]
    return Table([f"{name}: times as fast as", *peers], rows)


def speeds(plan: Plan, results: Measurements, task: str) -> list[str]:
    """Return the tokens per second of all backends for a task."""
    seconds = [median_seconds(runs) for runs in results.runs[task].values()]
    return [f"{plan.tokens_per_run(task) / median:,.1f}" for median in seconds]


def ratios(results: Measurements, task: str, name: str) -> list[str]:
    """Return how many times as fast a backend is as every other: the median over the rounds.

    The memory speed of a shared machine changes from minute to minute, but hardly within a round.
    """
    own = results.runs[task][name]
    peers = [runs for peer, runs in results.runs[task].items() if peer != name]
    by_peer = [[b.seconds / a.seconds for a, b in zip(own, runs, strict=True)] for runs in peers]
    return [f"{statistics.median(rounds):.2f}" for rounds in by_peer]


def resources(plan: Plan, results: Measurements) -> list[list[str]]:
    """Return rows of memory, loading time, and the share of the memory bandwidth in use."""
    backends = results.loading.values()
    rows = {
        "weights, GB": [f"{backend['nbytes'] / 1e9:.2f}" for backend in backends],
        "peak memory, GB": [f"{peak / 1e9:.2f}" for peak in results.peaks.values()],
        "load, s": [f"{backend['load']:.2f}" for backend in backends],
        "load to first token, s": [f"{backend['first']:.2f}" for backend in backends],
    }
    if 1 in plan.batches:
        steps = [median_seconds(runs) for runs in results.runs["decode, batch 1"].values()]
        rates = [backend["nbytes"] / step for backend, step in zip(backends, steps, strict=True)]
        rows["weights read in decoding, GB/s"] = [f"{rate / 1e9:.1f}" for rate in rates]
        rows[f"of {results.bandwidth / 1e9:.1f} GB/s that a sum reads"] = [
            f"{rate / results.bandwidth:.0%}" for rate in rates
        ]
    return [[name, *cells] for name, cells in rows.items()]


def to_dict(plan: Plan, results: Measurements) -> dict[str, Any]:
    """Return all results with enough digits to compute with."""
    return {
        "seconds": {
            task: {
                name: [round(run.seconds, 5) for run in runs] for name, runs in by_backend.items()
            }
            for task, by_backend in results.runs.items()
        },
        "tokens": {task: plan.tokens_per_run(task) for task in results.runs},
        "loading": results.loading,
        "peak_bytes": results.peaks,
        "read_bytes_per_second": round(results.bandwidth),
        "disturbance": footnote(results),
    }


def footnote(results: Measurements) -> str:
    """Describe the disturbances over all tasks and backends."""
    all_runs = {
        f"{task} {name}": runs
        for task, by_backend in results.runs.items()
        for name, runs in by_backend.items()
    }
    return disturbance(all_runs)
