"""What `llama32 bench` asks of its contenders, and what it tells of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama32.bench import run as module
from llama32.bench.contenders import KINDS, Ours, Transformers, median_step
from llama32.bench.plan import Form, PeerName, Plan, plan_for
from llama32.bench.report import facts, footnote, rich_tables, tables
from llama32.bench.run import Measured, Worker, measure
from llama32.bench.turns import Run
from llama32.generate import generate
from llama32.hub import resolve
from llama32.loading import load_model
from llama32.settings import Sampling
from tests.commands import json_of
from tests.commands import run as run_command

CONTENDERS = [("llama32", "optimized"), ("transformers", "as stored")]


def runs(*seconds: float) -> list[Run]:
    return [Run(one, None, 0.0, 0) for one in seconds]


def measured() -> Measured:
    ours, theirs = "llama32, optimized", "transformers, as stored"
    return Measured(
        runs={
            "decode, batch 1": {ours: runs(0.1, 0.2, 0.9), theirs: runs(0.1, 0.4, 0.4)},
            "decode, batch 8": {ours: runs(0.4), theirs: runs(0.2)},
            "prefill, 64": {ours: runs(0.5), theirs: runs(1.0)},
        },
        loading={
            ours: {"load": 1.0, "first": 1.5, "nbytes": 2_000_000_000},
            theirs: {"load": 0.5, "first": 2.5, "nbytes": 2_000_000_000},
        },
        peaks={ours: 2_500_000_000, theirs: 3_000_000_000},
        bandwidth=20e9,
    )


@pytest.fixture
def plan() -> Plan:
    return Plan(resolve("tiny"), CONTENDERS, (1, 8), (64,), runs=1)


def test_tables_tell_medians_ratios_and_resources(plan):
    speed, ratio, needs = tables(plan, measured())
    assert speed.rows == [
        ["decode, batch 1", "5.0", "2.5"],
        ["decode, batch 8", "20.0", "40.0"],
        ["prefill, 64", "128.0", "64.0"],
    ]
    assert ratio.head == ["llama32, optimized: times as fast as", "transformers, as stored"]
    assert [row[1] for row in ratio.rows] == ["1.00", "0.50", "2.00"]  # medians of rounds
    assert dict((row[0], row[1:]) for row in needs.rows) == {
        "weights, GB": ["2.00", "2.00"],
        "peak memory, GB": ["2.50", "3.00"],
        "load, s": ["1.00", "0.50"],
        "load to first token, s": ["1.50", "2.50"],
        "weights read in decoding, GB/s": ["10.0", "5.0"],
        "of 20.0 GB/s that a sum reads": ["50%", "25%"],
    }
    assert str(ratio).splitlines()[2] == "| decode, batch 1 | 1.00 |"
    assert len([*rich_tables(plan, measured())]) == 3


def test_one_contender_is_compared_with_nobody(plan):
    alone = measured()
    ours = "llama32, optimized"
    alone = Measured(
        {task: {ours: each[ours]} for task, each in alone.runs.items()},
        {ours: alone.loading[ours]},
        {ours: alone.peaks[ours]},
        alone.bandwidth,
    )
    assert len([*rich_tables(plan, alone)]) == 2


def test_facts_can_be_written_as_json(plan):
    found = json.loads(json.dumps(facts(plan, measured())))
    assert found["seconds"]["prefill, 64"]["transformers, as stored"] == [1.0]
    assert found["tokens"] == {"decode, batch 1": 1, "decode, batch 8": 8, "prefill, 64": 64}
    assert found["disturbance"] == footnote(measured())


def test_prompts_are_seeded_and_fit_the_model(plan):
    long = Plan(resolve("tiny"), CONTENDERS, (1,), (10**6,))
    limit = load_model("tiny").config.max_position_embeddings
    (prompt,) = (task["prompt"] for task in long.tasks.values() if "prompt" in task)
    assert 0 < len(prompt) < limit
    assert plan.tasks == Plan(resolve("tiny"), CONTENDERS, (1, 8), (64,)).tasks


def test_a_plan_names_the_type_that_llama_cpp_gets(monkeypatch):
    monkeypatch.setattr("llama32.bench.plan.find_spec", lambda name: True)
    both = [PeerName.transformers, PeerName.llama_cpp]
    plan = plan_for(Path(), [Form.int8, Form.plain], both)
    assert plan.contenders == [
        ("llama32", "int8"),
        ("llama32", "plain"),
        ("transformers", "as stored"),
        ("llama.cpp", "Q8_0"),
    ]
    assert plan_for(Path(), [Form.optimized], both).contenders[-1] == ("llama.cpp", "BF16")
    assert {name for name, _ in plan.contenders} == KINDS.keys()


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("llama32.bench.plan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--peer llama.cpp: not installed; pip install"):
        plan_for(Path(), [Form.plain], [PeerName.llama_cpp])


def test_a_step_is_the_median_of_those_that_count(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    timer = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("llama32.bench.contenders.time", timer)
    steps = []
    assert median_step(lambda: steps.append(1), 3) == 2
    assert len(steps) == 3 + 3


@pytest.mark.parametrize("form", ["plain", "optimized", "int8", "int4"])
def test_our_forms_decode_and_read(form):
    ours = Ours(resolve("tiny"), form)
    ours.first_token()
    assert ours.prefill([1, 2, 3]) > 0
    assert ours.decode([[1, 2, 3], [4, 5, 6]], 2) > 0
    plain = sum(weight.nbytes for weight in load_model("tiny").parameters())
    share = {"plain": 1, "optimized": 1, "int8": 0.5, "int4": 0.5}[form]
    assert 0.3 * share * plain < ours.nbytes <= share * plain * 1.1


def test_transformers_goes_on_as_our_loop_does():
    folder = resolve("tiny")
    peer = Transformers(folder, "float32")
    prompt = [1, 300, 17, 25]
    greedy = Sampling(temperature=0, max_new_tokens=6, ignore_eos=True)
    wanted = [t.id for t in generate(load_model(folder, dtype=torch.float32), prompt, greedy)]
    seen = []
    forward = peer.model.forward
    peer.model.forward = lambda ids, **of: seen.append(ids.view(-1).tolist()) or forward(ids, **of)
    steps = peer.steps([prompt])
    for _ in range(5):
        next(steps)
    assert [prompt, *([token] for token in wanted[:5])] == seen


def test_a_worker_answers_and_is_ended_whatever_comes(monkeypatch):
    told = []
    plan = Plan(resolve("tiny"), [("llama32", "plain")], (1,), (8,), 1, told.append)
    monkeypatch.setattr(module, "READ_BYTES", 1 << 20)
    started = []
    monkeypatch.setattr(module, "Worker", lambda *of: started.append(Worker(*of)) or started[-1])
    found = measure(plan)
    assert told == ["loading llama32, plain", "decode, batch 1", "prefill, 8"]
    assert found.loading["llama32, plain"]["first"] > found.loading["llama32, plain"]["load"] > 0
    assert found.peaks["llama32, plain"] > 10**8
    assert found.bandwidth > 0
    assert started[0].process.returncode == 0


def test_a_worker_that_fails_is_reported():
    with pytest.raises(ValueError, match="the process of llama32, int3 ended with 1"):
        Worker("llama32", "int3", resolve("tiny"))


def test_the_command_prints_tables_or_json(monkeypatch):
    monkeypatch.setattr("llama32.bench.command.measure", lambda plan: measured())
    shown = run_command("bench", "--peer", "transformers", "--prompt", "64")
    assert "llama32, optimized" in shown.stdout
    assert "128.0" in shown.stdout
    (found,) = json_of(run_command("bench", "--json", "--prompt", "64"))
    assert found["model"] == "tiny"


def test_all_prompts_are_decoded_at_once():
    engine = Ours(resolve("tiny"), "plain").decoding([[1, 2, 3 + i] for i in range(9)], 2)
    assert engine.stats.running == 9
