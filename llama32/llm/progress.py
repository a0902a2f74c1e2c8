"""A progress bar over many requests."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llama32.engine.engine import Engine


@contextmanager
def progress_bar(engine: Engine, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Show finished requests, tokens per second and cache use on stderr.

    Yields a function to call after each step with the number of finished requests. `shown` None
    means only on a terminal.
    """
    if shown is None:
        shown = sys.stderr.isatty()
    if not shown:
        yield lambda done: None
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}")
    console = Console(stderr=True, highlight=False)
    start, before = perf_counter(), engine.stats
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("requests", total=total, rates="")

        def report(done: int) -> None:
            now, seconds = engine.stats, perf_counter() - start
            computed = now.prompt_computed - before.prompt_computed
            cached = now.prompt_cached - before.prompt_cached
            rates = (
                f"in {(computed + cached) / seconds:,.0f} tokens/s, "
                f"out {(now.generated - before.generated) / seconds:,.0f} tokens/s, "
                f"cache {now.pages_held / now.pages:.0%}, "
                f"hits {cached / max(cached + computed, 1):.0%}"
            )
            bar.update(task, completed=done, rates=rates)

        yield report
