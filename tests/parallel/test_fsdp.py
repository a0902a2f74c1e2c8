"""Sharded training: the results of a single process, and states gathered and restored."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from llama32 import Llama, add_lora, load_model, save
from llama32.checkpoint.layouts import empty_model
from llama32.parallel.fsdp import gather, scatter, shard
from llama32.train.data import IGNORE_INDEX
from tests.checkpoints import random_model, tiny_config
from tests.processes import in_processes

CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 3},
    "untied": {"steps": 3, "tied": False},
    "clipped": {"steps": 3, "clip": 0.5},
    "in 16 bits": {"steps": 3, "autocast": True},
}
STEPS, MORE = 3, 2


def rows() -> tuple[Tensor, Tensor]:
    """Return four rows and their targets; the last two rows have few targets."""
    tokens = torch.randint(160, (4, 21), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[2, :9] = IGNORE_INDEX
    targets[3, 3:] = IGNORE_INDEX
    return inputs, targets


def make(tied: bool = True) -> Llama:
    return random_model(tiny_config(tie_word_embeddings=tied), seed=4)


def make_optimizer(model: Llama) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=1e-3)


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[slice],
    *,
    steps: int,
    clip: float = 1e9,
    autocast: bool = False,
) -> list[float]:
    """Train on parts of the rows with summed gradients, and return the gradient norms.

    The norms reveal a wrong factor on the gradients; AdamW hides the factor in the weights.
    """
    inputs, targets = rows()
    norms = []
    count = int((targets != IGNORE_INDEX).sum())  # in all processes
    for _ in range(steps):
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(inputs[part])
            flat = logits.flatten(0, 1).float(), targets[part].flatten()
            loss = F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum") / count
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


HALVES = slice(0, 2), slice(2, 4)


def train_case(
    model: Llama, parts: Sequence[slice], **case: Any
) -> tuple[torch.optim.Optimizer, list[float]]:
    case.pop("tied", None)
    optimizer = make_optimizer(model)
    return optimizer, train(model, optimizer, parts, **case)


def local_bytes(tensors: Sequence[Any]) -> int:
    """Return the bytes held by this process."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(part.nbytes for part in parts)


def collect(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    parts = [HALVES[mesh.get_rank()]]
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        model = shard(make(case.get("tied", True)), mesh)
        optimizer, norms = train_case(model, parts, **case)
        results[name] = gather(model, optimizer)
        results[name]["norms"] = norms
        results[name]["tied"] = model.lm_head.weight is model.embed.weight
        moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
        results[name]["bytes"] = local_bytes([*model.parameters()]), local_bytes(moments)
    results["resumed"] = resume(mesh, results["plain"], parts)
    results["adapted"] = adapt(mesh, parts)
    return results


def resume(mesh: DeviceMesh, state: dict[str, Any], parts: Sequence[slice]) -> dict[str, Any]:
    """Resume the plain case, in a model that is never unsharded in any process."""
    model = shard(empty_model(tiny_config()), mesh).to_empty(device="cpu")
    optimizer = make_optimizer(model)
    scatter(model, optimizer, deepcopy(state))
    train(model, optimizer, parts, steps=MORE)
    same_inv_freq = torch.equal(model.inv_freq, make().inv_freq)
    tied = model.lm_head.weight is model.embed.weight
    return gather(model, optimizer) | {"inv_freq": same_inv_freq, "tied": tied}


def adapt(mesh: DeviceMesh, parts: Sequence[slice]) -> dict[str, Any]:
    """Train an fp32 adapter on a bf16 model, and resume in another model."""
    models, optimizers, states = [], [], []
    for steps in (STEPS, MORE):
        model = make().bfloat16()
        add_lora(model, seed=1)
        models.append(shard(model, mesh))
        optimizers.append(make_optimizer(model))
        if states:
            scatter(models[-1], optimizers[-1], states[-1])
        train(models[-1], optimizers[-1], parts, steps=steps)
        states.append(gather(models[-1], optimizers[-1]))
    base = models[0].layers[0].attn.q_proj.base.weight.full_tensor()
    message = ""
    try:
        scatter(models[0], optimizers[0], {"model": {"norm.weight": base}, "optimizer": {}})
    except ValueError as error:
        message = str(error)
    return states[-1] | {"base": base, "error": message}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return in_processes(2, collect, folder, folder)


def weights_of(name: str, parts: Sequence[slice]) -> dict[str, Tensor]:
    model = make(CASES[name].get("tied", True))
    train_case(model, parts, **CASES[name])
    return model.state_dict()


def is_close(weights: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> bool:
    assert weights.keys() == expected.keys()
    return max(float((weights[name] - expected[name]).abs().max()) for name in weights) <= within


@pytest.mark.parametrize("name", ["plain", "untied", "in 16 bits"])
def test_two_processes_end_with_the_bits_of_a_process_that_sums_both_halves(name, results):
    expected = weights_of(name, HALVES)
    assert is_close(results[0][name]["model"], expected, within=0)
    assert not is_close(make(CASES[name].get("tied", True)).state_dict(), expected, within=1e-3)


def test_clipped_gradients_differ_in_the_last_bits_of_their_norm(results):
    expected = weights_of("clipped", HALVES)
    assert is_close(results[0]["clipped"]["model"], expected, within=1e-6)
    assert not is_close(results[0]["plain"]["model"], expected, within=1e-5)


@pytest.mark.parametrize("name", ["plain", "untied", "clipped"])
def test_weights_are_close_to_those_of_a_process_with_all_rows(name, results):
    expected = weights_of(name, [slice(0, 4)])
    assert is_close(results[0][name]["model"], expected, within=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_norm_is_the_norm_over_all_rows(name, results):
    model = make(CASES[name].get("tied", True))
    _, norms = train_case(model, HALVES, **CASES[name])
    for rank in results:
        assert rank[name]["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half_of_the_weights_and_optimizer_state(name, results):
    whole = sum(x.nbytes for x in make(CASES[name].get("tied", True)).parameters())
    for rank in results:
        assert rank[name]["bytes"] == (whole // 2, whole)  # AdamW keeps two numbers for each
        assert rank[name]["tied"] == CASES[name].get("tied", True)


def test_only_rank_0_gathers(results):
    assert results[1]["plain"]["model"] == results[1]["plain"]["optimizer"] == {}


@pytest.mark.parametrize("name", ["plain", "untied"])
def test_a_gathered_model_can_be_saved(name, results, tmp_path):
    model = make(CASES[name].get("tied", True))
    model.load_state_dict(results[0][name]["model"])
    save(model, tmp_path)
    tokens, _ = rows()
    loaded = load_model(tmp_path)
    assert loaded.config.tie_word_embeddings == (name == "plain")
    assert torch.equal(loaded(tokens), model(tokens))


def test_training_resumed_from_a_state_gives_the_bits_of_an_unbroken_run(results):
    model = make()
    train_case(model, HALVES, steps=STEPS + MORE)
    assert is_close(results[0]["resumed"]["model"], model.state_dict(), within=0)
    for rank in results:
        assert rank["resumed"]["inv_freq"]
        assert rank["resumed"]["tied"]


def test_training_can_resume_in_a_single_process(results):
    model = random_model(tiny_config(), seed=9)
    optimizer = make_optimizer(model)
    scatter(model, optimizer, deepcopy(results[0]["plain"]))
    train(model, optimizer, HALVES, steps=MORE)
    assert is_close(gather(model, optimizer)["model"], results[0]["resumed"]["model"], within=0)


def test_an_adapter_alone_is_trained_gathered_and_restored(results):
    model = make().bfloat16()
    lora = add_lora(model, seed=1)
    optimizer = make_optimizer(model)
    train(model, optimizer, HALVES, steps=STEPS + MORE)
    weights = results[0]["adapted"]["model"]
    assert len(weights) == len([*lora.parameters()])
    assert is_close(weights, gather(model, optimizer)["model"], within=0)
    for rank in results:
        base = model.get_parameter("layers.0.attn.q_proj.base.weight")
        assert torch.equal(rank["adapted"]["base"], base)
        message = rank["adapted"]["error"]
        assert message.startswith(
            "scatter: state and model differ in the trained weights: layers.0.attn"
        )
