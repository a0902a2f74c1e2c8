"""What a process has of a model that several share, how it gets it, and what cannot be shared."""

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
from llama32.adapt import parallel
from llama32.layouts import tensors
from llama32.saving import save
from tests.checkpoints import LLAMA3, edit_tensors, random_model, tiny_config, write_meta
from tests.processes import in_processes

WORLD = 2
CONFIG = tiny_config(num_attention_heads=8, num_key_value_heads=4, vocab_size=162)
UNTIED = tiny_config(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
TOKENS = torch.arange(60).reshape(2, 30)
LAYOUTS = {"hub": "hub", "16 bits": "16 bits", "untied": "untied"}
LAYOUTS |= {"meta, by rows": "meta0", "meta, by columns": "meta1", "meta, whole": "meta"}


class Counting(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made in memory of their own, and of all that is
    copied. A mapped file is neither, nor a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.copied = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_fresh = all(given.alias_info is None for given in func._schema.returns)
        if func is torch.ops.aten.copy_.default:
            self.copied += args[1].nbytes
        elif is_fresh and isinstance(out, torch.Tensor) and not out.is_meta:
            self.made += parallel.place(out)[0].nbytes
        return out


def share(model: Llama) -> int:
    """Bytes of what is really there, as its memory has them."""
    parts = [parallel.place(weight)[0] for weight in tensors(model).values()]
    return sum(part.untyped_storage().nbytes() for part in parts)


def look(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """All that is asked of one process."""
    seen: dict[str, Any] = {}
    for layout in LAYOUTS:
        factor = LLAMA3.factor if layout.startswith("meta") else None
        where = folder / LAYOUTS[layout]
        with Counting() as counted:
            model = parallel.load_model(where, mesh, rope_factor=factor)
        cut = parallel.parallelize(llama32.load_model(where, rope_factor=factor), mesh)
        seen[layout] = {
            "weights": same(model, cut),
            "tied": model.lm_head.weight is model.embed.weight,
            "share": share(model),
            "share of a cut one": share(cut),
            "made": counted.made,
            "copied": counted.copied,
            "heads": (model.config.num_attention_heads, model.config.num_key_value_heads),
        }
    seen["errors"] = {name: said(error, mesh, folder) for name, error in ERRORS.items()}
    seen["warned"] = warned(mesh, folder)
    seen["heads"] = captured(mesh, folder)
    rank = mesh.get_rank()
    model = parallel.load_model(folder / "hub", mesh)
    rich = EngineSettings(cache_bytes=500_000 * (1 + rank))
    agreed = [parallel.agreed(settings, model, mesh) for settings in (rich, rich)]
    seen["agreed"] = [(settings.cache_tokens, settings.seed) for settings in agreed]
    return seen


def same(one: Llama, other: Llama) -> bool:
    """Whether two parts have the same bits, in the same places."""
    mine, its = tensors(one), tensors(other)
    assert mine.keys() == its.keys()
    assert torch.equal(one.rotary_speeds, other.rotary_speeds)
    return all(
        isinstance(mine[name], DTensor) == isinstance(its[name], DTensor)
        and mine[name].dtype == its[name].dtype
        and parallel.place(mine[name])[1:] == parallel.place(its[name])[1:]
        and torch.equal(parallel.place(mine[name])[0], parallel.place(its[name])[0])
        for name in mine
    )


def warned(mesh: DeviceMesh, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel.load_model(folder / "nan", mesh)
    return [str(warning.message) for warning in caught]


def captured(mesh: DeviceMesh, folder: Path) -> list[tuple[int, ...]]:
    model = parallel.load_model(folder / "hub", mesh)
    names = "layers.0.attn.heads", "layers.0.attn", "layers.0.mlp.up_proj", "logits"
    with torch.no_grad(), capture(model, *names) as seen:
        model(TOKENS)
    assert {type(x) for x in seen.values()} == {torch.Tensor}  # nothing is still on its way
    return [tuple(seen[name].shape) for name in names]


def too_many(mesh: DeviceMesh, folder: Path) -> None:
    parallel.load_model(folder / "three heads", mesh)


def odd_mlp(mesh: DeviceMesh, folder: Path) -> None:
    parallel.parallelize(random_model(tiny_config(intermediate_size=111)), mesh)


def with_adapter(mesh: DeviceMesh, folder: Path) -> None:
    model = random_model(CONFIG)
    add_lora(model)
    parallel.parallelize(model, mesh)


def with_integers(mesh: DeviceMesh, folder: Path) -> None:
    parallel.parallelize(quantize(random_model(CONFIG), "int8"), mesh)


def stored_as_integers(mesh: DeviceMesh, folder: Path) -> None:
    parallel.load_model(folder / "int8", mesh)


def two_dimensions(mesh: DeviceMesh, folder: Path) -> None:
    wide = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("copies", "parts"))
    parallel.parallelize(random_model(CONFIG), wide["parts"])
    parallel.parallelize(random_model(CONFIG), wide)


ERRORS: dict[str, Callable[[DeviceMesh, Path], None]] = {
    "heads": too_many,
    "mlp": odd_mlp,
    "adapter": with_adapter,
    "quantized": with_integers,
    "stored": stored_as_integers,
    "mesh": two_dimensions,
}


def said(does: Callable[[DeviceMesh, Path], None], mesh: DeviceMesh, folder: Path) -> str:
    try:
        does(mesh, folder)
    except ValueError as error:
        return str(error)
    return "nothing"


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
def seen(folder) -> list[dict[str, Any]]:
    return in_processes(WORLD, look, folder / "processes", folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_that_was_read_is_the_part_of_the_whole(layout, seen):
    for rank in seen:
        assert rank[layout]["weights"]
        assert rank[layout]["tied"] == (layout != "untied")
        assert rank[layout]["heads"] == (4, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_part_is_read_and_in_memory(layout, seen, folder):
    factor = LLAMA3.factor if layout.startswith("meta") else None
    weights = tensors(llama32.load_model(folder / LAYOUTS[layout], rope_factor=factor)).values()
    norms = sum(weight.nbytes for weight in weights if weight.ndim == 1)
    matrices = sum(weight.nbytes for weight in weights if weight.ndim == 2)
    for rank in seen:
        assert rank[layout]["share"] == norms + matrices // WORLD
        assert rank[layout]["copied"] == rank[layout]["share"]
        assert rank[layout]["share"] <= rank[layout]["made"] < 1.2 * rank[layout]["share"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_model_that_was_whole_only_the_part_stays(layout, seen):
    for rank in seen:
        assert rank[layout]["share of a cut one"] == rank[layout]["share"]


def test_heads_and_gates_are_seen_in_parts_and_sums_whole(seen):
    for rank in seen:
        assert rank["heads"] == [(2, 30, 4, 10), (2, 30, 48), (2, 30, 56), (2, 30, 162)]


def test_what_is_not_finite_is_told_by_whoever_reads_it(seen):
    for rank in seen:
        [message] = rank["warned"]
        assert message.endswith("nan: NaN or infinity in model.norm.weight")


def test_engines_agree_on_the_smallest_cache_and_on_a_seed(seen):
    first, second = (rank["agreed"] for rank in seen)
    assert first == second
    (tokens, seed), (_, another) = first
    assert 0 < tokens < 500_000 // (2 * 3 * 2 * 10 * 4)  # what rank 0 has room for
    assert seed != another  # from chance


def test_what_cannot_be_cut_is_refused_with_what_to_do(seen):
    for rank in seen:
        errors = rank["errors"]
        assert errors["heads"] == (
            "parallel: 3 key and value heads and an mlp of 112 cannot be shared out evenly among "
            "2 processes; possible are 1. More processes can run more copies: give each copy a "
            "part of a mesh of two dimensions"
        )
        assert "an mlp of 111 cannot be shared" in errors["mlp"]
        plain = "only plain layers in floats are cut; merge or remove adapters"
        assert "layers.0.attn.q_proj, layers.0.attn.v_proj, layers.1.attn" in errors["adapter"]
        assert plain in errors["adapter"]
        assert plain in errors["quantized"]
        assert errors["stored"].endswith(
            "in int8 are not cut; load the checkpoint that it was made of"
        )
        assert (
            errors["mesh"] == "parallel: the mesh has 2 dimensions; give one of them, mesh['parts']"
        )


STORY = """
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from llama32.adapt import parallel

mesh = init_device_mesh("cpu", (2,))
llm = parallel.load("tiny", mesh)
result = llm.generate("Once upon a time", temperature=0, max_new_tokens=24)
drawn = llm.generate(["One day, a dog", "He said"], temperature=1.0, max_new_tokens=24)
if mesh.get_rank() == 0:
    print(result.text)
    print(len(drawn))
distributed.destroy_process_group()
"""


def test_a_script_under_torchrun_prints_once_what_one_process_says(tmp_path):
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
