"""Interleaved timing: turns, and repeats of disturbed runs."""

from llama32.bench import interleave as module
from llama32.bench.interleave import (
    Run,
    disturbance,
    interleave,
    median_seconds,
    run_once,
    run_undisturbed,
)


def disturbed(*shares: float):
    """Return a run callable with the given shares of other processes, call by call."""
    runs = [Run(float(i), None, share, 0) for i, share in enumerate(shares)]
    return lambda: runs.pop(0)


def test_an_undisturbed_run_counts():
    assert run_undisturbed(disturbed(0.01)) == Run(0.0, None, 0.01, 0)


def test_a_disturbed_run_is_rejected_and_repeated():
    assert run_undisturbed(disturbed(0.5, 0.3, 0.04)) == Run(2.0, None, 0.04, 2)


def test_the_least_disturbed_run_counts_if_all_are_disturbed():
    run = run_undisturbed(disturbed(0.5, 0.2, 0.3))
    assert run == Run(1.0, None, 0.2, 2)
    quiet = Run(1.0, None, 0.0, 0)
    assert disturbance({"a": [run], "b": [quiet]}) == (
        "2 runs counted, 2 rejected because other processes used over 5% of the processors, "
        "1 of the counted runs disturbed as well"
    )


def test_calls_take_turns_after_an_uncounted_run():
    order = []

    def recorder(name: str):
        def run() -> Run:
            order.append(name)
            return Run(float(len(order)), None, 0.0, 0)

        return run

    results = interleave({"a": recorder("a"), "b": recorder("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [run.seconds for run in results["b"]] == [4.0, 6.0]
    assert median_seconds(results["b"]) == 5.0


def test_the_share_of_other_processes_excludes_the_own_time(monkeypatch):
    machine, own, wall = iter([100.0, 103.0]), iter([10.0, 11.5]), iter([0.0, 2.0])
    monkeypatch.setattr(module, "machine_seconds", lambda: next(machine))
    monkeypatch.setattr(module.time, "process_time", lambda: next(own))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    run = run_once(lambda: (1.9, "result"))
    assert run[:2] == (1.9, "result")
    assert abs(run.others_share - (1.5 - 0.03) / 4) < 1e-9


def test_without_proc_stat_the_share_of_other_processes_is_0(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PROC_STAT", tmp_path / "none")
    assert run_once(lambda: (0.0, None)).others_share == 0
