import dataclasses
import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from subprocess import PIPE

import pytest
from rich.console import Console

from llama32.cli import terminal
from llama32.cli.terminal import BYTES, consume, progress_bar, write
from llama32.llm.loading import load
from tests.alphabet import alphabet_checkpoint


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A checkpoint that never generates an end token."""
    return alphabet_checkpoint(tmp_path_factory.mktemp("endless"), ends=False)


def on_terminal(monkeypatch) -> StringIO:
    shown = StringIO()
    plain = Console(file=shown, force_terminal=True, width=100, markup=False, highlight=False)
    monkeypatch.setattr(terminal, "err", plain)
    return shown


def test_a_bar_shows_until_the_work_is_done(monkeypatch):
    shown = on_terminal(monkeypatch)
    with progress_bar("loading", BYTES) as report:
        report(1_000_000, 4_000_000)
        report(4_000_000, 4_000_000)
    assert "loading" in shown.getvalue()
    assert "/4.0 MB" in shown.getvalue()


def test_no_bar_shows_for_finished_work_or_without_a_terminal_or_when_disabled(monkeypatch):
    shown = on_terminal(monkeypatch)
    with progress_bar("loading", BYTES) as report:
        report(4, 4)
    with progress_bar("loading", BYTES, shown=False) as report:
        report(1, 4)
    assert shown.getvalue() == ""
    monkeypatch.setattr(terminal, "err", Console(file=shown))
    with progress_bar("loading", BYTES) as report:
        report(1, 4)
    assert shown.getvalue() == ""


def test_an_interrupt_removes_the_bar(monkeypatch):
    shown = on_terminal(monkeypatch)
    with suppress(KeyboardInterrupt), progress_bar("loading", BYTES) as report:
        report(1, 4)
        raise KeyboardInterrupt
    assert shown.getvalue().endswith("\x1b[2K")  # the line is empty again


def test_control_characters_reach_files_but_not_a_terminal(monkeypatch):
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    for file, shown in ((StringIO(), "a\x1b[2J\tb\n\x9b"), (Terminal(), "a\ufffd[2J\tb\n\ufffd")):
        monkeypatch.setattr(sys, "stdout", file)
        write("a\x1b[2J\tb\n\x9b")
        assert file.getvalue() == shown
    shown = on_terminal(monkeypatch)
    terminal.note("a\x1b[2J")
    assert "a\ufffd[2J" in shown.getvalue()


def test_speed_counts_the_tokens_after_the_first(endless, monkeypatch):
    clock = iter([0.0, 2.0, 5.0])
    monkeypatch.setattr(terminal, "perf_counter", lambda: next(clock))
    llm = load(endless)
    result, timings = consume(
        lambda **on: llm.stream("aaa", max_new_tokens=7, **on), lambda _: None
    )
    assert dataclasses.astuple(timings) == (2.0, 3.0, 4 / 2, 6 / 3)
    line = "prompt: 4 tokens, 2.0 tokens/s; text: 7 tokens, 2.0 tokens/s"
    assert terminal.speed_line(result, timings) == line


# with real signals, pipes and terminals

ROOT = Path(__file__).parents[2]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "llama32", *map(str, args)]


class Screen:
    """A command in a separate pseudo-terminal."""

    def __init__(self, *args: object) -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            command(*args), cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def until(self, text: str) -> str:
        """Wait for a text, and return the output up to and including the text."""
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], 120)
            assert ready, f"{text!r} did not appear after {self.shown!r}"
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        before, text, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(endless):
    with Screen("chat", "-m", endless, "-n", 100_000) as screen:
        screen.until("> ")
        screen.type("Hello\n")
        screen.until("ABC")
        screen.interrupt()
        screen.until("interrupted")
        screen.until("text: ")
        screen.until("> ")
        screen.type("/help\n")
        screen.until("clear the dialog")
        screen.until("> ")
        screen.type("\x04")
        assert screen.process.wait() == 0


def test_a_terminal_shows_the_prompt_dimmed_and_ctrl_c_exits_with_130(endless):
    with Screen("generate", "ab", "-m", endless, "-n", 100_000) as screen:
        shown = screen.until("cdef")
        assert shown.endswith("\x1b[2mab\x1b[0mcdef")
        screen.interrupt()
        screen.until("interrupted")
        assert screen.process.wait() == 130


def test_a_closed_pipe_ends_the_command_silently(endless):
    args = command("generate", "a", "-m", endless, "-n", 100_000, "-q")
    with subprocess.Popen(args, cwd=ROOT, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(5) == b"bcdef"
        process.stdout.close()
        assert process.stderr.read() == b""
