"""Training in several processes is training in one, and what they hold comes together again."""

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
from llama32.adapt.sharded import gather, scatter, shard
from llama32.layouts import skeleton
from llama32.train.data import IGNORED
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
    """Four rows and their targets, of which the last two rows have few."""
    tokens = torch.randint(160, (4, 21), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[2, :9] = IGNORED
    targets[3, 3:] = IGNORED
    return inputs, targets


def make(tied: bool = True) -> Llama:
    return random_model(tiny_config(tie_word_embeddings=tied), seed=4)


def make_optimizer(model: Llama) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=1e-3)


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    mine: Sequence[slice],
    *,
    steps: int,
    clip: float = 1e9,
    autocast: bool = False,
) -> list[float]:
    """Steps over these parts of the rows, whose gradients are added up. AdamW would hide a factor
    on them; their norms, which are returned, do not."""
    inputs, targets = rows()
    norms = []
    count = int((targets != IGNORED).sum())  # of all processes
    for _ in range(steps):
        for part in mine:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(inputs[part])
            flat = logits.flatten(0, 1).float(), targets[part].flatten()
            loss = F.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / count
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


HALVES = slice(0, 2), slice(2, 4)


def train_case(
    model: Llama, mine: Sequence[slice], **case: Any
) -> tuple[torch.optim.Optimizer, list[float]]:
    case.pop("tied", None)
    optimizer = make_optimizer(model)
    return optimizer, train(model, optimizer, mine, **case)


def here(tensors: Sequence[Any]) -> int:
    """Bytes that are in this process."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(part.nbytes for part in parts)


def look(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    mine = [HALVES[mesh.get_rank()]]
    seen: dict[str, Any] = {}
    for name, case in CASES.items():
        model = shard(make(case.get("tied", True)), mesh)
        optimizer, norms = train_case(model, mine, **case)
        seen[name] = gather(model, optimizer)
        seen[name]["norms"] = norms
        seen[name]["tied"] = model.lm_head.weight is model.embed.weight
        moments = [x for one in optimizer.state.values() for x in one.values() if x.ndim]
        seen[name]["bytes"] = here([*model.parameters()]), here(moments)
    seen["resumed"] = resume(mesh, seen["plain"], mine)
    seen["adapted"] = adapt(mesh, mine)
    return seen


def resume(mesh: DeviceMesh, state: dict[str, Any], mine: Sequence[slice]) -> dict[str, Any]:
    """The plain case goes on, in a model that was never whole in any process."""
    model = shard(skeleton(tiny_config()), mesh).to_empty(device="cpu")
    optimizer = make_optimizer(model)
    scatter(model, optimizer, deepcopy(state))
    train(model, optimizer, mine, steps=MORE)
    speeds = torch.equal(model.rotary_speeds, make().rotary_speeds)
    tied = model.lm_head.weight is model.embed.weight
    return gather(model, optimizer) | {"speeds": speeds, "tied": tied}


def adapt(mesh: DeviceMesh, mine: Sequence[slice]) -> dict[str, Any]:
    """An adapter in fp32 is trained over a base in bf16, and goes on in another model."""
    models, optimizers, states = [], [], []
    for steps in (STEPS, MORE):
        model = make().bfloat16()
        add_lora(model, seed=1)
        models.append(shard(model, mesh))
        optimizers.append(make_optimizer(model))
        if states:
            scatter(models[-1], optimizers[-1], states[-1])
        train(models[-1], optimizers[-1], mine, steps=steps)
        states.append(gather(models[-1], optimizers[-1]))
    base = models[0].layers[0].attn.q_proj.base.weight.full_tensor()
    wrong = ""
    try:
        scatter(models[0], optimizers[0], {"model": {"norm.weight": base}, "optimizer": {}})
    except ValueError as error:
        wrong = str(error)
    return states[-1] | {"base": base, "wrong": wrong}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return in_processes(2, look, folder, folder)


def weights_of(name: str, mine: Sequence[slice]) -> dict[str, Tensor]:
    model = make(CASES[name].get("tied", True))
    train_case(model, mine, **CASES[name])
    return model.state_dict()


def is_close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> bool:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found) <= within


@pytest.mark.parametrize("name", ["plain", "untied", "in 16 bits"])
def test_two_processes_end_with_the_bits_of_one_that_adds_up_their_halves(name, seen):
    expected = weights_of(name, HALVES)
    assert is_close(seen[0][name]["model"], expected, within=0)
    assert not is_close(make(CASES[name].get("tied", True)).state_dict(), expected, within=1e-3)


def test_clipped_gradients_differ_in_the_last_bits_of_their_norm(seen):
    expected = weights_of("clipped", HALVES)
    assert is_close(seen[0]["clipped"]["model"], expected, within=1e-6)
    assert not is_close(seen[0]["plain"]["model"], expected, within=1e-5)


@pytest.mark.parametrize("name", ["plain", "untied", "clipped"])
def test_it_is_as_if_one_process_had_all_rows(name, seen):
    expected = weights_of(name, [slice(0, 4)])
    assert is_close(seen[0][name]["model"], expected, within=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_norm_of_the_gradient_is_that_of_all_rows(name, seen):
    model = make(CASES[name].get("tied", True))
    _, norms = train_case(model, HALVES, **CASES[name])
    for rank in seen:
        assert rank[name]["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_holds_half_of_the_weights_and_of_the_optimizers_state(name, seen):
    whole = sum(x.nbytes for x in make(CASES[name].get("tied", True)).parameters())
    for rank in seen:
        assert rank[name]["bytes"] == (whole // 2, whole)  # AdamW keeps two numbers for each
        assert rank[name]["tied"] == CASES[name].get("tied", True)


def test_only_rank_0_gathers(seen):
    assert seen[1]["plain"]["model"] == seen[1]["plain"]["optimizer"] == {}


@pytest.mark.parametrize("name", ["plain", "untied"])
def test_what_is_gathered_can_be_saved(name, seen, tmp_path):
    model = make(CASES[name].get("tied", True))
    model.load_state_dict(seen[0][name]["model"])
    save(model, tmp_path)
    tokens, _ = rows()
    loaded = load_model(tmp_path)
    assert loaded.config.tie_word_embeddings == (name == "plain")
    assert torch.equal(loaded(tokens), model(tokens))


def test_training_goes_on_from_a_state_as_if_it_had_not_ended(seen):
    model = make()
    train_case(model, HALVES, steps=STEPS + MORE)
    assert is_close(seen[0]["resumed"]["model"], model.state_dict(), within=0)
    for rank in seen:
        assert rank["resumed"]["speeds"]
        assert rank["resumed"]["tied"]


def test_it_goes_on_in_one_process_too(seen):
    model = random_model(tiny_config(), seed=9)
    optimizer = make_optimizer(model)
    scatter(model, optimizer, deepcopy(seen[0]["plain"]))
    train(model, optimizer, HALVES, steps=MORE)
    assert is_close(gather(model, optimizer)["model"], seen[0]["resumed"]["model"], within=0)


def test_an_adapter_alone_is_trained_gathered_and_put_back(seen):
    model = make().bfloat16()
    lora = add_lora(model, seed=1)
    optimizer = make_optimizer(model)
    train(model, optimizer, HALVES, steps=STEPS + MORE)
    found = seen[0]["adapted"]["model"]
    assert len(found) == len([*lora.parameters()])
    assert is_close(found, gather(model, optimizer)["model"], within=0)
    for rank in seen:
        base = model.get_parameter("layers.0.attn.q_proj.base.weight")
        assert torch.equal(rank["adapted"]["base"], base)
        message = rank["adapted"]["wrong"]
        assert message.startswith(
            "scatter: the state is not of what is trained here: layers.0.attn"
        )
