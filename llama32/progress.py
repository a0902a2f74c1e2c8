"""A bar over many requests, for those who wait."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llama32.engine.engine import Engine


@contextmanager
def watch(engine: Engine, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how many of the requests are done, tokens per second, the use of the cache.

    What it gives is to be told after each step how many are done. `shown` None: on a terminal.
    """
    if shown is None:
        shown = sys.stderr.isatty()
    if not shown:
        yield lambda done: None
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[about]}")
    console = Console(stderr=True, highlight=False)
    began, before = perf_counter(), engine.stats
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("requests", total=total, about="")

        def report(done: int) -> None:
            now, seconds = engine.stats, perf_counter() - began
            computed = now.prompt_computed - before.prompt_computed
            cached = now.prompt_cached - before.prompt_cached
            about = (
                f"in {(computed + cached) / seconds:,.0f} tokens/s, "
                f"out {(now.generated - before.generated) / seconds:,.0f} tokens/s, "
                f"cache {now.pages_held / now.pages:.0%}, "
                f"hits {cached / max(cached + computed, 1):.0%}"
            )
            bar.update(task, completed=done, about=about)

        yield report
