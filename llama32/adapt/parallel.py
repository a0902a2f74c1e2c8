"""Tensor parallelism: one model over several processes, each with its part of every matrix.

    # torchrun --nproc-per-node 2 story.py
    mesh = init_device_mesh("cpu", (2,))            # or "cuda", a GPU for each process
    llm = parallel.load("meta-llama/Llama-3.2-1B-Instruct", mesh)
    result = llm.generate("Once upon a time")       # in every process, with the same result
    if mesh.get_rank() == 0:
        print(result.text)

A matrix whose outputs are heads or gates is cut by outputs: each process computes its own, and
needs nobody for it. The one behind it is cut by inputs: what the processes make of theirs is added
up. So a layer exchanges two sums of the width, one after attention and one after the mlp, and a
process runs the lines of `model.py` with fewer heads. (Megatron-LM, Shoeybi et al. 2019)

Every process runs the same script with the same requests in the same order, and steps with the
others; the server, whose requests come when they come, is not for that. Merge adapters and leave
out `quantize` and `optimize`: only layers in floats are cut. On several GPUs it has not run yet.
"""

import logging
import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from secrets import randbits
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from llama32.checkpoint import Checkpoint, inspect
from llama32.config import LlamaConfig
from llama32.engine import memory
from llama32.engine.settings import EngineSettings
from llama32.hub import resolve
from llama32.layouts import skeleton
from llama32.llm import LLM
from llama32.loading import assemble
from llama32.model import Llama
from llama32.stored import MappedFiles, few

logger = logging.getLogger(__name__)

# Colwise and rowwise are of the matrix as formulas have it, inputs by outputs; PyTorch stores it
# the other way round. The vocabulary is cut alike for both ends, so they can be one matrix: the
# embedding adds up the vectors of all processes, of which only one has found the token; the head
# puts their logits side by side.
PLAN: dict[str, ParallelStyle] = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "layers.*.attn.q_proj": ColwiseParallel(),
    "layers.*.attn.k_proj": ColwiseParallel(),
    "layers.*.attn.v_proj": ColwiseParallel(),
    "layers.*.attn.o_proj": RowwiseParallel(),
    "layers.*.mlp.gate_proj": ColwiseParallel(),
    "layers.*.mlp.up_proj": ColwiseParallel(),
    "layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}


def parallelize(model: Llama, mesh: DeviceMesh) -> Llama:
    """Leave of a model only the part of this process, in place. All have to bring the same model.

    `model.config` then tells of the part, which has so many heads less: a cache that is made for it
    is this process's share of the cache, and the engine need not know. ValueError, and nothing is
    done, where it cannot be cut into so many parts.
    """
    config = part_of(model.config, mesh)
    if odd := [name for name, part in model.named_modules() if is_planned(name) and not fits(part)]:
        raise ValueError(
            f"parallel: {few(odd)}: only plain layers in floats are cut; merge or remove adapters, "
            "and neither quantize nor optimize"
        )
    is_tied = model.lm_head.weight is model.embed.weight
    parallelize_module(model, mesh, PLAN, src_data_rank=None)  # nothing is sent
    if is_tied:
        model.lm_head.weight = model.embed.weight
    for name, part in model.named_modules():
        if is_planned(name):
            part.register_forward_hook(arrived)
    model.config = config
    return model


def part_of(config: LlamaConfig, mesh: DeviceMesh) -> LlamaConfig:
    """The config of what one process has of a model: fewer heads, and a narrower mlp."""
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ("tp",)
        raise ValueError(
            f"parallel: the mesh has {mesh.ndim} dimensions; give one of them, mesh[{names[-1]!r}]"
        )
    H, K, F = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    n = mesh.size()
    if K % n or F % n:
        able = ", ".join(str(i) for i in range(1, K + 1) if not (K % i or F % i))
        raise ValueError(
            f"parallel: {K} key and value heads and an mlp of {F} cannot be shared out evenly "
            f"among {n} processes; possible are {able}. More processes can run more copies: "
            f"give each copy a part of a mesh of two dimensions"
        )
    return replace(
        config, num_attention_heads=H // n, num_key_value_heads=K // n, intermediate_size=F // n
    )


def load_model(
    name: str | Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
) -> Llama:
    """The part of this process of a checkpoint: nothing else is read, or ever in memory.

    Of a matrix that is cut by inputs, every row in the file has something for everyone: the system
    may then fetch all of it from the disk, but only the part is copied. Files of either layout are
    cut as the model is, not as they are. Whatever is wrong with them is an error of one line.
    """
    found = inspect(resolve(name), rope_factor=rope_factor)
    logger.info("%s, in %d parts", found, mesh.size())
    if found.config.quantization is not None:
        raise ValueError(
            f"{found.folder}: weights in {found.config.quantization} are not cut; load the "
            "checkpoint that it was made of"
        )
    whole = skeleton(found.config).to(dtype or found.dtype)
    model = parallelize(whole, mesh).to_empty(device=mesh.device_type)
    read(model, found)
    return model


@torch.no_grad()
def read(model: Llama, found: Checkpoint) -> None:
    """Into each weight, from the files, what it holds of the whole."""
    files = MappedFiles(budget=found.nbytes // 32)  # so much more, for mapping anew as often
    broken = []
    for name, stored in found.tensors.items():
        part, axis, start = place(model.get_parameter(name))
        stored.copy_to(part, files, axis, start)
        if not torch.stack(part.aminmax()).isfinite().all():
            broken.append(stored.name)
    if broken:
        warnings.warn(f"{found.folder}: NaN or infinity in {few(broken)}", stacklevel=3)


def place(weight: Tensor) -> tuple[Tensor, int, int]:
    """The part of a weight that is here, the axis along which it is cut, and where it begins."""
    if not isinstance(weight, DTensor):
        return weight, 0, 0
    axis = weight.placements[0].dim  # pyright: ignore[reportAttributeAccessIssue]
    size = -(-weight.shape[axis] // weight.device_mesh.size())  # the last part may be smaller
    return weight.to_local(), axis, weight.device_mesh.get_local_rank() * size


def load(
    name: str | Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
    chat_style: str | None = None,
    engine: EngineSettings | None = None,
) -> LLM:
    """The same with all that it takes to generate, as `llama32.load`. Every process has to ask it
    for the same, and gets the same."""
    folder = resolve(name)
    model = load_model(folder, mesh, dtype=dtype, rope_factor=rope_factor)
    settings = agreed(engine or EngineSettings(), model, mesh)
    return assemble(folder, model, chat_style, settings)


def agreed(settings: EngineSettings, model: Llama, mesh: DeviceMesh) -> EngineSettings:
    """Settings under which the engines of all processes plan the same steps: as many pages as the
    one with the least memory has room for, and one seed for requests that bring none."""
    seed = randbits(62) if settings.seed is None else settings.seed
    least = torch.tensor([memory.num_pages(model, settings), seed], device=mesh.device_type)
    distributed.all_reduce(least, distributed.ReduceOp.MIN, mesh.get_group())
    pages, seed = least.tolist()
    tokens = pages * memory.page_size(model, settings)
    return replace(settings, cache_tokens=tokens, cache_bytes=None, seed=seed)


def arrived(part: nn.Module, given: Any, x: Tensor) -> Tensor:
    """PyTorch hands out sums that are still on their way, and waits when they are first used. Of a
    prompt the logits never are, and they would stay open for ever. (In training all is used, and
    `wait` would cut the graph.)"""
    if isinstance(x, AsyncCollectiveTensor) and not x.requires_grad:
        return x.wait()
    return x


def is_planned(name: str) -> bool:
    """Whether a module of this name is cut."""
    return any(fnmatchcase(name, pattern) for pattern in PLAN)


def fits(part: nn.Module) -> bool:
    """Whether PyTorch can cut it."""
    return isinstance(part, nn.Linear | nn.Embedding)
