import random
import sys

import pytest

from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.llm import progress
from llama32.llm.progress import progress_bar
from llama32.sampling_params import Sampling
from tests.checkpoints import random_model, tiny_config


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "perf_counter", clock)
    return clock


@pytest.fixture
def engine(monkeypatch) -> Engine:
    """An engine with ten pages, and a terminal wide enough for the whole line."""
    monkeypatch.setenv("COLUMNS", "200")
    return Engine.of(random_model(tiny_config()), EngineSettings(cache_tokens=640))


def prompt(length: int, seed: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(4, 160) for _ in range(length)]


def on_terminal(monkeypatch, is_terminal: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)


def test_nothing_is_shown_if_disabled(engine, monkeypatch, capsys):
    on_terminal(monkeypatch, True)
    with progress_bar(engine, 3, shown=False) as report:
        report(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_by_default_the_bar_is_shown_on_a_terminal_only(
    engine, monkeypatch, capsys, clock, is_terminal
):
    on_terminal(monkeypatch, is_terminal)
    with progress_bar(engine, 3, shown=None) as report:
        clock.now += 1
        report(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("3/3" in err) is is_terminal
    assert bool(err) is is_terminal


def test_the_bar_is_on_stderr_and_counts_finished_requests(engine, capsys, clock):
    with progress_bar(engine, 7, shown=True) as report:
        for done in (0, 2, 5):
            clock.now += 1
            report(done)
    out, err = capsys.readouterr()
    assert out == ""
    assert "5/7" in err


def test_the_bar_shows_tokens_per_second_cache_use_and_hits(engine, capsys, clock):
    for _ in range(2):  # earlier requests do not count
        engine.add(prompt(130, seed=0), Sampling(max_new_tokens=5, ignore_eos=True))
        while engine.is_busy:
            engine.step()
    with progress_bar(engine, 2, shown=True) as report:
        engine.add(prompt(130, seed=0), Sampling(max_new_tokens=5))  # 3 pages, 2 of them cached
        engine.add(prompt(70, seed=1), Sampling(max_new_tokens=5))  # 2 pages
        engine.step()
        clock.now += 0.125
        report(0)
    _, err = capsys.readouterr()
    assert "in 1,600 tokens/s, out 16 tokens/s, cache 50%, hits 64%" in err


def test_speeds_are_averages_since_the_start(engine, capsys, clock):
    with progress_bar(engine, 1, shown=True) as report:
        engine.add(prompt(70, seed=1), Sampling(max_new_tokens=30, ignore_eos=True))
        while engine.is_busy:
            engine.step()
            clock.now += 0.5
            report(0)
        report(1)
    _, err = capsys.readouterr()
    assert "1/1 in 5 tokens/s, out 2 tokens/s, cache 0%, hits 0%" in err


def test_an_exception_passes_through_and_the_cursor_is_restored(engine, monkeypatch, capsys, clock):
    on_terminal(monkeypatch, True)

    def work() -> None:
        with progress_bar(engine, 3, shown=True) as report:
            clock.now += 1
            report(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    _, err = capsys.readouterr()
    assert "1/3" in err
    hides, shows = "\x1b[?25l", "\x1b[?25h"
    assert err.count(hides) == err.count(shows) == 1
