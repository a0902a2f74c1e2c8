"""Tensor parallelism: shards in each process, loading, and models that cannot be sharded."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import llama32
from llama32 import EngineSettings, Llama, add_lora, capture, quantize
from llama32.checkpoint.layouts import named_tensors
from llama32.checkpoint.writer import save
from llama32.parallel import tensor_parallel
from tests.checkpoints import LLAMA3, edit_tensors, random_model, tiny_config, write_meta
from tests.processes import in_processes

WORLD = 2
CONFIG = tiny_config(num_attention_heads=8, num_key_value_heads=4, vocab_size=162)
UNTIED = tiny_config(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
TOKENS = torch.arange(60).reshape(2, 30)
LAYOUTS = {"hub": "hub", "16 bits": "16 bits", "untied": "untied"}
LAYOUTS |= {"meta, by rows": "meta0", "meta, by columns": "meta1", "meta, one file": "meta"}


class Counting(TorchDispatchMode):
    """Counts the bytes of newly allocated tensors and of copies, but not of mapped files."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.copied = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_fresh = all(result.alias_info is None for result in func._schema.returns)
        if func is torch.ops.aten.copy_.default:
            self.copied += args[1].nbytes
        elif is_fresh and isinstance(out, torch.Tensor) and not out.is_meta:
            self.allocated += tensor_parallel.local_shard(out)[0].nbytes
        return out


def held_bytes(model: Llama) -> int:
    """Return the bytes of storage behind the local shards."""
    shards = [tensor_parallel.local_shard(weight)[0] for weight in named_tensors(model).values()]
    return sum(shard.untyped_storage().nbytes() for shard in shards)


def collect(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Run in each process; return the values for all tests."""
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        factor = LLAMA3.factor if layout.startswith("meta") else None
        path = folder / LAYOUTS[layout]
        with Counting() as counted:
            model = tensor_parallel.load_shard(path, mesh, rope_factor=factor)
        whole = llama32.load_model(path, rope_factor=factor)
        parallelized = tensor_parallel.parallelize(whole, mesh)
        results[layout] = {
            "weights": is_same(model, parallelized),
            "tied": model.lm_head.weight is model.embed.weight,
            "bytes": held_bytes(model),
            "bytes if parallelized": held_bytes(parallelized),
            "allocated": counted.allocated,
            "copied": counted.copied,
            "heads": (model.config.num_attention_heads, model.config.num_key_value_heads),
        }
    results["errors"] = {name: error_message(call, mesh, folder) for name, call in ERRORS.items()}
    results["warned"] = warned(mesh, folder)
    results["heads"] = captured(mesh, folder)
    rank = mesh.get_rank()
    model = tensor_parallel.load_shard(folder / "hub", mesh)
    settings = EngineSettings(cache_bytes=500_000 * (1 + rank))
    agreed = [tensor_parallel.agree_on_settings(settings, model, mesh) for _ in range(2)]
    results["agree_on_settings"] = [(each.cache_tokens, each.seed) for each in agreed]
    return results


def is_same(model: Llama, expected: Llama) -> bool:
    """True if two shards have the same bits at the same positions."""
    tensors, expected_tensors = named_tensors(model), named_tensors(expected)
    assert tensors.keys() == expected_tensors.keys()
    assert torch.equal(model.inv_freq, expected.inv_freq)
    return all(
        isinstance(tensors[name], DTensor) == isinstance(expected_tensors[name], DTensor)
        and tensors[name].dtype == expected_tensors[name].dtype
        and tensor_parallel.local_shard(tensors[name])[1:]
        == tensor_parallel.local_shard(expected_tensors[name])[1:]
        and torch.equal(
            tensor_parallel.local_shard(tensors[name])[0],
            tensor_parallel.local_shard(expected_tensors[name])[0],
        )
        for name in tensors
    )


def warned(mesh: DeviceMesh, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensor_parallel.load_shard(folder / "nan", mesh)
    return [str(warning.message) for warning in caught]


def captured(mesh: DeviceMesh, folder: Path) -> list[tuple[int, ...]]:
    model = tensor_parallel.load_shard(folder / "hub", mesh)
    names = "layers.0.attn.heads", "layers.0.attn", "layers.0.mlp.up_proj", "logits"
    with torch.no_grad(), capture(model, *names) as results:
        model(TOKENS)
    assert {type(x) for x in results.values()} == {torch.Tensor}  # every collective has completed
    return [tuple(results[name].shape) for name in names]


def too_many(mesh: DeviceMesh, folder: Path) -> None:
    tensor_parallel.load_shard(folder / "three heads", mesh)


def odd_mlp(mesh: DeviceMesh, folder: Path) -> None:
    tensor_parallel.parallelize(random_model(tiny_config(intermediate_size=111)), mesh)


def with_adapter(mesh: DeviceMesh, folder: Path) -> None:
    model = random_model(CONFIG)
    add_lora(model)
    tensor_parallel.parallelize(model, mesh)


def with_integers(mesh: DeviceMesh, folder: Path) -> None:
    tensor_parallel.parallelize(quantize(random_model(CONFIG), "int8"), mesh)


def stored_as_integers(mesh: DeviceMesh, folder: Path) -> None:
    tensor_parallel.load_shard(folder / "int8", mesh)


def two_dimensions(mesh: DeviceMesh, folder: Path) -> None:
    wide = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("copies", "parts"))
    tensor_parallel.parallelize(random_model(CONFIG), wide["parts"])
    tensor_parallel.parallelize(random_model(CONFIG), wide)


ERRORS: dict[str, Callable[[DeviceMesh, Path], None]] = {
    "heads": too_many,
    "mlp": odd_mlp,
    "adapter": with_adapter,
    "quantized": with_integers,
    "stored": stored_as_integers,
    "mesh": two_dimensions,
}


def error_message(call: Callable[[DeviceMesh, Path], None], mesh: DeviceMesh, folder: Path) -> str:
    try:
        call(mesh, folder)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    model = random_model(CONFIG, seed=1)
    save(model, folder / "hub", max_shard_bytes=40_000)
    save(random_model(UNTIED, seed=1), folder / "untied")
    for shards, axis, name in ((2, 0, "meta0"), (2, 1, "meta1"), (1, 0, "meta")):
        write_meta(model, folder / name, num_shards=shards, embed_axis=axis)
    save(model.bfloat16(), folder / "16 bits")
    save(random_model(CONFIG), folder / "nan")
    edit_tensors(folder / "nan", lambda x: x["model.norm.weight"].fill_(torch.nan))
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    save(random_model(tiny_config(**heads)), folder / "three heads")
    save(quantize(random_model(CONFIG), "int8"), folder / "int8")
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict[str, Any]]:
    return in_processes(WORLD, collect, folder / "processes", folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_shard_is_the_shard_of_the_whole_model(layout, results):
    for rank in results:
        assert rank[layout]["weights"]
        assert rank[layout]["tied"] == (layout != "untied")
        assert rank[layout]["heads"] == (4, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_shard_is_read_and_in_memory(layout, results, folder):
    factor = LLAMA3.factor if layout.startswith("meta") else None
    weights = named_tensors(
        llama32.load_model(folder / LAYOUTS[layout], rope_factor=factor)
    ).values()
    norms = sum(weight.nbytes for weight in weights if weight.ndim == 1)
    matrices = sum(weight.nbytes for weight in weights if weight.ndim == 2)
    for rank in results:
        assert rank[layout]["bytes"] == norms + matrices // WORLD
        assert rank[layout]["copied"] == rank[layout]["bytes"]
        assert rank[layout]["bytes"] <= rank[layout]["allocated"] < 1.2 * rank[layout]["bytes"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parallelizing_a_whole_model_frees_the_rest(layout, results):
    for rank in results:
        assert rank[layout]["bytes if parallelized"] == rank[layout]["bytes"]


def test_captured_heads_and_gates_are_sharded_and_sums_are_complete(results):
    for rank in results:
        assert rank["heads"] == [(2, 30, 4, 10), (2, 30, 48), (2, 30, 56), (2, 30, 162)]


def test_every_process_warns_of_nan(results):
    for rank in results:
        [message] = rank["warned"]
        assert message.endswith("nan: NaN or infinity in model.norm.weight")


def test_engines_agree_on_the_smallest_cache_and_on_a_seed(results):
    first, second = (rank["agree_on_settings"] for rank in results)
    assert first == second
    (tokens, seed), (_, another) = first
    assert 0 < tokens < 500_000 // (2 * 3 * 2 * 10 * 4)  # the limit of rank 0
    assert seed != another  # drawn at random


def test_errors_say_what_to_do_when_a_model_cannot_be_sharded(results):
    for rank in results:
        errors = rank["errors"]
        assert errors["heads"] == (
            "parallel: 3 key/value heads and an mlp width of 112 do not divide evenly among 2 "
            "processes, allowed: 1. To use more processes, run several copies of the model, each "
            "on one dimension of a two-dimensional mesh"
        )
        assert "an mlp width of 111 do not divide" in errors["mlp"]
        plain = "only plain floating-point layers can be sharded; merge or remove adapters"
        assert "layers.0.attn.q_proj, layers.0.attn.v_proj, layers.1.attn" in errors["adapter"]
        assert plain in errors["adapter"]
        assert plain in errors["quantized"]
        assert errors["stored"].endswith(
            "in int8 cannot be sharded; load the unquantized checkpoint"
        )
        assert (
            errors["mesh"] == "parallel: the mesh has 2 dimensions, allowed: 1; pass mesh['parts']"
        )


STORY = """
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from llama32.parallel import tensor_parallel

mesh = init_device_mesh("cpu", (2,))
llm = tensor_parallel.load("tiny", mesh)
result = llm.generate("Once upon a time", temperature=0, max_new_tokens=24)
drawn = llm.generate(["One day, a dog", "He said"], temperature=1.0, max_new_tokens=24)
if mesh.get_rank() == 0:
    print(result.text)
    print(len(drawn))
distributed.destroy_process_group()
"""


def test_a_script_under_torchrun_prints_the_text_of_a_single_process_once(tmp_path):
    script = tmp_path / "story.py"
    script.write_text(STORY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(llama32.__file__).parents[1])}
    done = subprocess.run(
        [*torchrun, script], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    llm = llama32.load("tiny")
    alone = llm.generate("Once upon a time", temperature=0, max_new_tokens=24)
    assert done.stdout == f"{alone.text}\n2\n"
