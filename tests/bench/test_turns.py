"""Turns are fair: interleaved, and repeated where others had the machine."""

from llama32.bench import turns
from llama32.bench.turns import Run, disturbance, interleave, median, run_once, run_undisturbed


def of(*others: float):
    """A turn that is disturbed like this, time after time."""
    left = [Run(float(i), None, share, 0) for i, share in enumerate(others)]
    return lambda: left.pop(0)


def test_a_quiet_run_is_taken_as_it_is():
    assert run_undisturbed(of(0.01)) == Run(0.0, None, 0.01, 0)


def test_a_disturbed_run_is_thrown_away_and_repeated():
    assert run_undisturbed(of(0.5, 0.3, 0.04)) == Run(2.0, None, 0.04, 2)


def test_where_no_run_is_quiet_the_quietest_counts_and_it_is_told():
    run = run_undisturbed(of(0.5, 0.2, 0.3))
    assert run == Run(1.0, None, 0.2, 2)
    quiet = Run(1.0, None, 0.0, 0)
    assert disturbance({"a": [run], "b": [quiet]}) == (
        "2 runs counted, 2 rejected since others had over 5% of the processors, 1 counted although "
        "they had"
    )


def test_contenders_take_turns_after_a_run_that_does_not_count():
    order = []

    def turn(name: str):
        def take() -> Run:
            order.append(name)
            return Run(float(len(order)), None, 0.0, 0)

        return take

    found = interleave({"a": turn("a"), "b": turn("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [run.seconds for run in found["b"]] == [4.0, 6.0]
    assert median(found["b"]) == 5.0


def test_what_others_took_is_what_the_machine_did_less_ones_own(monkeypatch):
    machine, own, wall = iter([100.0, 103.0]), iter([10.0, 11.5]), iter([0.0, 2.0])
    monkeypatch.setattr(turns, "machine_seconds", lambda: next(machine))
    monkeypatch.setattr(turns.time, "process_time", lambda: next(own))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(turns.os, "cpu_count", lambda: 2)
    run = run_once(lambda: (1.9, "result"))
    assert run[:2] == (1.9, "result")
    assert abs(run.others - (1.5 - 0.03) / 4) < 1e-9


def test_without_a_kernel_that_counts_nobody_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "STAT", tmp_path / "none")
    assert run_once(lambda: (0.0, None)).others == 0
