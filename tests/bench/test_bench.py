"""Benchmarks: plans, backends, worker processes and reports."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama32.bench import run as bench_run
from llama32.bench.backends import BACKENDS, Llama32Backend, TransformersBackend, median_step
from llama32.bench.interleave import Run
from llama32.bench.plan import PeerName, Plan, WeightFormat, make_plan
from llama32.bench.report import footnote, rich_tables, tables, to_dict
from llama32.bench.run import Measurements, Worker, measure
from llama32.checkpoint.hub import resolve
from llama32.generate import generate
from llama32.llm.loading import load_model
from llama32.sampling_params import Sampling
from tests.commands import json_of
from tests.commands import run as run_command

BACKEND_NAMES = [("llama32", "optimized"), ("transformers", "as stored")]


def runs(*seconds: float) -> list[Run]:
    return [Run(each, None, 0.0, 0) for each in seconds]


def measured() -> Measurements:
    own, peer = "llama32, optimized", "transformers, as stored"
    return Measurements(
        runs={
            "decode, batch 1": {own: runs(0.1, 0.2, 0.9), peer: runs(0.1, 0.4, 0.4)},
            "decode, batch 8": {own: runs(0.4), peer: runs(0.2)},
            "prefill, 64": {own: runs(0.5), peer: runs(1.0)},
        },
        loading={
            own: {"load": 1.0, "first": 1.5, "nbytes": 2_000_000_000},
            peer: {"load": 0.5, "first": 2.5, "nbytes": 2_000_000_000},
        },
        peaks={own: 2_500_000_000, peer: 3_000_000_000},
        bandwidth=20e9,
    )


@pytest.fixture
def plan() -> Plan:
    return Plan(resolve("tiny"), BACKEND_NAMES, (1, 8), (64,), runs=1)


def test_tables_show_medians_ratios_and_resources(plan):
    speed, ratio, resources = tables(plan, measured())
    assert speed.rows == [
        ["decode, batch 1", "5.0", "2.5"],
        ["decode, batch 8", "20.0", "40.0"],
        ["prefill, 64", "128.0", "64.0"],
    ]
    assert ratio.head == ["llama32, optimized: times as fast as", "transformers, as stored"]
    assert [row[1] for row in ratio.rows] == ["1.00", "0.50", "2.00"]  # medians over rounds
    assert dict((row[0], row[1:]) for row in resources.rows) == {
        "weights, GB": ["2.00", "2.00"],
        "peak memory, GB": ["2.50", "3.00"],
        "load, s": ["1.00", "0.50"],
        "load to first token, s": ["1.50", "2.50"],
        "weights read in decoding, GB/s": ["10.0", "5.0"],
        "of 20.0 GB/s that a sum reads": ["50%", "25%"],
    }
    assert str(ratio).splitlines()[2] == "| decode, batch 1 | 1.00 |"
    assert len([*rich_tables(plan, measured())]) == 3


def test_a_single_backend_gets_no_comparison(plan):
    both = measured()
    name = "llama32, optimized"
    alone = Measurements(
        {task: {name: by_backend[name]} for task, by_backend in both.runs.items()},
        {name: both.loading[name]},
        {name: both.peaks[name]},
        both.bandwidth,
    )
    assert len([*rich_tables(plan, alone)]) == 2


def test_results_can_be_written_as_json(plan):
    written = json.loads(json.dumps(to_dict(plan, measured())))
    assert written["seconds"]["prefill, 64"]["transformers, as stored"] == [1.0]
    assert written["tokens"] == {"decode, batch 1": 1, "decode, batch 8": 8, "prefill, 64": 64}
    assert written["disturbance"] == footnote(measured())


def test_prompts_are_seeded_and_fit_the_model(plan):
    long = Plan(resolve("tiny"), BACKEND_NAMES, (1,), (10**6,))
    limit = load_model("tiny").config.max_position_embeddings
    (prompt,) = (task["prompt"] for task in long.tasks.values() if "prompt" in task)
    assert 0 < len(prompt) < limit
    assert plan.tasks == Plan(resolve("tiny"), BACKEND_NAMES, (1, 8), (64,)).tasks


def test_a_plan_selects_the_gguf_type_for_llama_cpp(monkeypatch):
    monkeypatch.setattr("llama32.bench.plan.find_spec", lambda name: True)
    both = [PeerName.transformers, PeerName.llama_cpp]
    plan = make_plan(Path(), [WeightFormat.int8, WeightFormat.plain], both)
    assert plan.backends == [
        ("llama32", "int8"),
        ("llama32", "plain"),
        ("transformers", "as stored"),
        ("llama.cpp", "Q8_0"),
    ]
    assert make_plan(Path(), [WeightFormat.optimized], both).backends[-1] == ("llama.cpp", "BF16")
    assert {name for name, _ in plan.backends} == BACKENDS.keys()


def test_an_error_names_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("llama32.bench.plan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--peer llama.cpp: not installed; pip install"):
        make_plan(Path(), [WeightFormat.plain], [PeerName.llama_cpp])


def test_the_median_step_excludes_the_warm_up(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    timer = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("llama32.bench.backends.time", timer)
    steps = []
    assert median_step(lambda: steps.append(1), 3) == 2
    assert len(steps) == 3 + 3


@pytest.mark.parametrize("weight_format", ["plain", "optimized", "int8", "int4"])
def test_every_weight_format_decodes_and_prefills(weight_format):
    backend = Llama32Backend(resolve("tiny"), weight_format)
    backend.first_token()
    assert backend.prefill([1, 2, 3]) > 0
    assert backend.decode([[1, 2, 3], [4, 5, 6]], 2) > 0
    plain = sum(weight.nbytes for weight in load_model("tiny").parameters())
    share = {"plain": 1, "optimized": 1, "int8": 0.5, "int4": 0.5}[weight_format]
    assert 0.3 * share * plain < backend.nbytes <= share * plain * 1.1


def test_transformers_decodes_the_tokens_of_our_loop():
    folder = resolve("tiny")
    peer = TransformersBackend(folder, "float32")
    prompt = [1, 300, 17, 25]
    greedy = Sampling(temperature=0, max_new_tokens=6, ignore_eos=True)
    expected = [t.id for t in generate(load_model(folder, dtype=torch.float32), prompt, greedy)]
    calls = []
    forward = peer.model.forward
    peer.model.forward = lambda ids, **options: (
        calls.append(ids.view(-1).tolist()) or forward(ids, **options)
    )
    steps = peer.decode_steps([prompt])
    for _ in range(5):
        next(steps)
    assert [prompt, *([token] for token in expected[:5])] == calls


def test_a_plan_is_measured_and_the_workers_end(monkeypatch):
    lines = []
    plan = Plan(resolve("tiny"), [("llama32", "plain")], (1,), (8,), 1, lines.append)
    monkeypatch.setattr(bench_run, "READ_BYTES", 1 << 20)
    started = []
    monkeypatch.setattr(
        bench_run, "Worker", lambda *args: started.append(Worker(*args)) or started[-1]
    )
    results = measure(plan)
    assert lines == ["loading llama32, plain", "decode, batch 1", "prefill, 8"]
    assert (
        results.loading["llama32, plain"]["first"] > results.loading["llama32, plain"]["load"] > 0
    )
    assert results.peaks["llama32, plain"] > 10**8
    assert results.bandwidth > 0
    assert started[0].process.returncode == 0


def test_a_failed_worker_raises_an_error():
    with pytest.raises(ValueError, match="the process of llama32, int3 ended with exit code 1"):
        Worker("llama32", "int3", resolve("tiny"))


def test_the_command_prints_tables_or_json(monkeypatch):
    monkeypatch.setattr("llama32.cli.bench.measure", lambda plan: measured())
    shown = run_command("bench", "--peer", "transformers", "--prompt", "64")
    assert "llama32, optimized" in shown.stdout
    assert "128.0" in shown.stdout
    (printed,) = json_of(run_command("bench", "--json", "--prompt", "64"))
    assert printed["model"] == "tiny"


def test_all_prompts_are_decoded_in_one_batch():
    engine = Llama32Backend(resolve("tiny"), "plain").start_decoding(
        [[1, 2, 3 + i] for i in range(9)], 2
    )
    assert engine.stats.running == 9
