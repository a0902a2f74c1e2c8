"""A model in several processes has the logits, gradients and outputs of a single process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llama32 import EngineSettings, PromptLookup, Sampling, load_model
from llama32.checkpoint.writer import save
from llama32.engine.engine import Engine
from llama32.generate import generate
from llama32.model import Llama
from llama32.parallel import tensor_parallel
from llama32.train.loop import next_token_loss
from tests.checkpoints import random_model, tiny_config
from tests.processes import in_processes

FOUR_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS = {  # a vocabulary of 161 has no even parts
    "tied": tiny_config(**FOUR_HEADS),
    "untied": tiny_config(**FOUR_HEADS, tie_word_embeddings=False, vocab_size=161),
    "tied, uneven vocabulary": tiny_config(**FOUR_HEADS, vocab_size=161),
}
TOKENS = torch.arange(160).reshape(2, 80)
ASKED = {
    "greedy": ([3, 1, 4], Sampling(temperature=0, max_new_tokens=8)),
    "drawn": ([1, 5, 9, 2], Sampling(temperature=0.8, top_p=0.9, seed=7, max_new_tokens=8)),
    "drawn by the engine's seed": ([6, 5], Sampling(temperature=1.0, max_new_tokens=8)),
    "several pages": ([*range(2, 100)], Sampling(temperature=1.2, seed=1, max_new_tokens=8)),
    "repeated": ([7, 8, 9] * 9, Sampling(temperature=0, max_new_tokens=8)),
}
PLAIN = EngineSettings(cache_tokens=2048, seed=5)
OTHERS = {  # tried with one model, since each takes a while
    "int8 cache": replace(PLAIN, cache_dtype="int8"),
    "drafts": replace(PLAIN, speculation=PromptLookup()),
}
WHERE = [(2, name) for name in (*CONFIGS, "tiny")] + [(4, name) for name in CONFIGS]


def say(model: Llama, kinds: dict[str, EngineSettings]) -> dict[str, Any]:
    """All that is compared, of a model or of the part of one."""
    said: dict[str, Any] = {}
    logits = model(TOKENS)
    next_token_loss(model, TOKENS).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    said["logits"] = logits.detach()
    said["gradients"] = {name: whole(x) for name, x in gradients.items() if x is not None}
    for kind, settings in kinds.items():
        engine = Engine.of(model, settings)
        requests = [engine.add(*asked) for asked in ASKED.values()]
        while engine.is_busy:
            engine.step()
        said[kind] = [request.output for request in requests]
    said["loop"] = [token.id for token in generate(model, *ASKED["drawn"])]
    return said


def kinds(name: str) -> dict[str, EngineSettings]:
    return {"plain": PLAIN} | (OTHERS if name == "tied" else {})


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def say_in_parts(mesh: DeviceMesh, folder: Path, names: list[str]) -> dict[str, dict]:
    said = {}
    for name in names:
        path = "tiny" if name == "tiny" else folder / name
        model = tensor_parallel.load_shard(path, mesh, dtype=torch.float32)
        said[name] = say(model, kinds(name))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    for name, config in CONFIGS.items():
        save(random_model(config, seed=2), folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict]:
    paths: dict[str, Any] = {name: folder / name for name in CONFIGS} | {"tiny": "tiny"}
    models = {name: load_model(path, dtype=torch.float32) for name, path in paths.items()}
    return {name: say(model, kinds(name)) for name, model in models.items()}


@pytest.fixture(scope="module")
def shared(folder) -> dict[int, list[dict[str, dict]]]:
    return {
        world: in_processes(
            world,
            say_in_parts,
            folder / f"of {world}",
            folder,
            [name for count, name in WHERE if count == world],
        )
        for world in (2, 4)
    }


@pytest.mark.parametrize(("world", "name"), WHERE)
def test_logits_are_those_of_one_process(world, name, shared, alone):
    expected = alone[name]["logits"]
    for rank in shared[world]:
        error = (rank[name]["logits"] - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()  # sums in another order


@pytest.mark.parametrize(("world", "name"), WHERE)
def test_gradients_are_those_of_one_process(world, name, shared, alone):
    expected = alone[name]["gradients"]
    for rank in shared[world]:
        found = rank[name]["gradients"]
        assert found.keys() == expected.keys()
        for weight, gradient in expected.items():
            assert torch.allclose(found[weight], gradient, atol=1e-5, rtol=1e-4), weight


@pytest.mark.parametrize(("world", "name"), WHERE)
@pytest.mark.parametrize("kind", ["plain", "loop"])
def test_what_is_generated_is_what_one_process_generates(world, name, kind, shared, alone):
    for rank in shared[world]:
        assert rank[name][kind] == alone[name][kind]


@pytest.mark.parametrize("kind", OTHERS)
def test_so_it_is_with_a_cache_of_bytes_and_with_drafts(kind, shared, alone):
    for rank in (*shared[2], *shared[4]):
        assert rank["tied"][kind] == alone["tied"][kind]


@pytest.mark.parametrize(("world", "name"), WHERE)
def test_all_processes_have_the_same_bits(world, name, shared):
    first, *others = (rank[name]["logits"] for rank in shared[world])
    assert all(torch.equal(first, other) for other in others)
