"""Terminal input and output: text, progress bars, speed and errors.

Only generated text goes to stdout. Notes and errors go to stderr, and progress bars go to stderr
only if stderr is a terminal.
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

from llama32.llm.result import Result
from llama32.llm.stream import Stream

BYTES = DownloadColumn(), TransferSpeedColumn()
SHAPES = MofNCompleteColumn(), TextColumn("shapes")
TOKENS = MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()

out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)

# Escape sequences in a generated text would control the terminal, so line breaks and tabs are the
# only control characters that pass.
CONTROL_CHARS = {
    code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def write(piece: str) -> None:
    """Print a piece of text immediately; a terminal gets no control characters."""
    sys.stdout.write(piece.translate(CONTROL_CHARS) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note(text: str, style: str = "dim") -> None:
    """Print a line to stderr, wrapped between words only on a terminal."""
    err.print(text.translate(CONTROL_CHARS), style=style, soft_wrap=not err.is_terminal)


def print_error(error: BaseException, advice: str = "") -> None:
    """Print an error as a single line."""
    line = " ".join(str(error).split()) or "out of memory"
    note(f"error: {line}{advice}", style="red")


def print_warning(message: object, *_: object, **__: object) -> None:
    """Print a warning without the source location (replaces `warnings.showwarning`)."""
    note(f"warning: {message}", style="yellow")


class NoteHandler(logging.Handler):
    """A log handler that prints records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record with the time of day."""
        style = "red" if record.levelno >= logging.WARNING else "dim"
        note(f"{formatdate(record.created, localtime=True)[17:25]} {self.format(record)}", style)


def show_log() -> None:
    """Show log records of llama32 from INFO, and of other packages from WARNING."""
    logging.basicConfig(level=logging.WARNING, handlers=[NoteHandler()], format="%(message)s")
    logging.getLogger("llama32").setLevel(logging.INFO)


@contextmanager
def progress_bar(
    label: str, columns: tuple[ProgressColumn, ...], shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; the yielded function takes (done, total) and moves the bar.

    The bar appears at the first report with done < total and disappears at the end.
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
    """Prefill and decode time of an answer."""

    prefill_seconds: float  # until the prompt is computed
    decode_seconds: float  # from the end of prefill to the last token
    prefill_tokens_per_second: float
    decode_tokens_per_second: float  # without the first token, a product of the prefill


def consume(
    start: Callable[..., Stream],
    show: Callable[[str], object],
    *,
    echo: str = "",
    bars: bool = True,
) -> tuple[Result, Timings]:
    """Start a stream and pass each piece of text to `show`, until the end or Ctrl-C.

    `echo` is a prompt to print before the first piece. After Ctrl-C the result holds the
    text so far and has the finish reason "abort".
    """
    reports = [(0, perf_counter())]  # (computed prompt tokens, time)
    with progress_bar("reading the prompt", TOKENS, bars) as move:

        def on_prefill(done: int, total: int) -> None:
            reports.append((done, perf_counter()))
            move(done, total)
            if done == total:
                out.print(echo, style="dim", end="", soft_wrap=True)

        stream = start(on_prefill=on_prefill)
        with suppress(KeyboardInterrupt):
            for piece in stream:
                show(piece)
    end = perf_counter()
    (_, start_time), (prompt_tokens, prefill_end) = reports[0], reports[-1]
    decode_tokens = max(len(stream.result.ids) - 1, 0)
    return stream.result, Timings(
        prefill_seconds=prefill_end - start_time,
        decode_seconds=end - prefill_end,
        prefill_tokens_per_second=per_second(prompt_tokens, prefill_end - start_time),
        decode_tokens_per_second=per_second(decode_tokens, end - prefill_end),
    )


def per_second(count: int, elapsed: float) -> float:
    """Return a rate; 0 without tokens, also if no time has passed."""
    return count / elapsed if count else 0.0


def speed_line(result: Result, timings: Timings) -> str:
    """Return token counts and tokens per second as a single line."""
    parts = (
        ("prompt", result.usage.prompt_tokens, timings.prefill_tokens_per_second),
        ("text", result.usage.completion_tokens, timings.decode_tokens_per_second),
    )
    counts = (
        f"{part}: {n} tokens" + f", {rate:.1f} tokens/s" * (rate > 0) for part, n, rate in parts
    )
    return "; ".join(counts)


def read_text(argument: str | None, name: str) -> str:
    """Return an argument, or standard input if the argument is missing or "-"."""
    if argument is None and sys.stdin.isatty():
        raise typer.BadParameter("give a text, or pipe a text in", param_hint=name)
    if argument in (None, "-"):
        return decode_utf8(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    return decode_utf8(os.fsencode(argument), name)


def read_file(file: Path) -> str:
    """Return the text of a file, or standard input for "-"."""
    is_piped = str(file) == "-"
    data = sys.stdin.buffer.read() if is_piped else file.read_bytes()
    return decode_utf8(data, "stdin" if is_piped else str(file))


def decode_utf8(data: bytes, name: str) -> str:
    """Decode UTF-8; raises ValueError with the offset of the first invalid byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise ValueError(f"{name}: not UTF-8 ({where}); convert it first") from None
