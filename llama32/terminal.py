"""Text in, text out, and what a person sees meanwhile: progress bars, speed, errors.

Only text goes to stdout. All the rest goes to stderr, and bars only where that is a terminal.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from time import perf_counter

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama32.stream import Stream
from llama32.transcript import Result

BYTES = DownloadColumn(), TransferSpeedColumn()
SHAPES = MofNCompleteColumn(), TextColumn("shapes")
TOKENS = MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()

out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)

# A text may hold escape sequences, and they would command the terminal: line breaks and tabs are
# all that passes of the control characters.
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def write(piece: str) -> None:
    """Show a piece of text at once, exactly, but for control characters on a terminal."""
    sys.stdout.write(piece.translate(CONTROL) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note(text: str, style: str = "dim") -> None:
    """A line beside the text. A terminal breaks it between words, a file keeps it whole."""
    err.print(text.translate(CONTROL), style=style, soft_wrap=not err.is_terminal)


def complain(error: BaseException, advice: str = "") -> None:
    """One line, whatever the error says."""
    line = " ".join(str(error).split()) or "out of memory"
    note(f"error: {line}{advice}", style="red")


def warn(message: object, *_: object, **__: object) -> None:
    """A warning without the place in the code that it came from. (`warnings.showwarning`)"""
    note(f"warning: {message}", style="yellow")


class Notes(logging.Handler):
    """A log whose lines are notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """One of them."""
        style = "red" if record.levelno >= logging.WARNING else "dim"
        note(f"{formatdate(record.created, localtime=True)[17:25]} {self.format(record)}", style)


def show_log() -> None:
    """Show what is logged of the program's own work, and the faults of all else."""
    logging.basicConfig(level=logging.WARNING, handlers=[Notes()], format="%(message)s")
    logging.getLogger("llama32").setLevel(logging.INFO)


@contextmanager
def bar(
    label: str, columns: tuple[ProgressColumn, ...], shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A bar that moves as the function it gives is told (done, total).

    It appears with the first report that leaves something to do, and goes away at the end.
    """
    if not (shown and err.is_terminal):
        yield lambda done, total: None
        return
    progress = Progress(TextColumn(label), BarColumn(), *columns, console=err, transient=True)
    task = progress.add_task(label, total=None)

    def report(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        progress.start() if done < total else progress.stop()

    try:
        yield report
    finally:
        progress.stop()


@dataclass(frozen=True)
class Timings:
    """Where the time of an answer went."""

    prefill_seconds: float  # until the prompt was read
    decode_seconds: float  # from then on
    prefill_tokens_per_second: float
    decode_tokens_per_second: float  # but for the first token, which the prefill brings


def listen(
    start: Callable[..., Stream],
    show: Callable[[str], object],
    *,
    echo: str = "",
    bars: bool = True,
) -> tuple[Result, Timings]:
    """Hand each piece of the stream that `start` makes to `show`, until it ends or Ctrl-C.

    `echo` is a prompt to show before them. What a Ctrl-C leaves is a result like any other, with
    the finish reason "abort".
    """
    reports = [(0, perf_counter())]  # tokens of the prompt that were read, and when
    with bar("reading the prompt", TOKENS, bars) as move:

        def on_prefill(done: int, total: int) -> None:
            reports.append((done, perf_counter()))
            move(done, total)
            if done == total:
                out.print(echo, style="dim", end="", soft_wrap=True)

        stream = start(on_prefill=on_prefill)
        with suppress(KeyboardInterrupt):
            for piece in stream:
                show(piece)
    ended = perf_counter()
    (_, began), (tokens_read, read) = reports[0], reports[-1]
    later_tokens = max(len(stream.result.ids) - 1, 0)
    return stream.result, Timings(
        prefill_seconds=read - began,
        decode_seconds=ended - read,
        prefill_tokens_per_second=tokens_read / (read - began) if tokens_read else 0.0,
        decode_tokens_per_second=later_tokens / (ended - read) if later_tokens else 0.0,
    )


def speed(result: Result, timings: Timings) -> str:
    """One line on it."""
    parts = (
        ("prompt", result.usage.prompt_tokens, timings.prefill_tokens_per_second),
        ("text", result.usage.completion_tokens, timings.decode_tokens_per_second),
    )
    counts = (f"{of}: {n} tokens" + f", {rate:.1f} tokens/s" * (rate > 0) for of, n, rate in parts)
    return "; ".join(counts)


def read_text(given: str | None, name: str) -> str:
    """An argument, or in place of none or of "-" what is piped in."""
    if given is None and sys.stdin.isatty():
        raise typer.BadParameter("give one, or pipe one in", param_hint=name)
    if given in (None, "-"):
        return decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    return decode(os.fsencode(given), name)


def read_file(file: Path) -> str:
    """All of a file, or for "-" what is piped in."""
    is_piped = str(file) == "-"
    data = sys.stdin.buffer.read() if is_piped else file.read_bytes()
    return decode(data, "stdin" if is_piped else str(file))


def decode(data: bytes, name: str) -> str:
    """UTF-8, or a ValueError that says where it is not."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise ValueError(f"{name}: not UTF-8 ({where}); convert it first") from None
