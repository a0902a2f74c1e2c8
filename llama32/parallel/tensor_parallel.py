"""Tensor parallelism: a model on several processes, each with a shard of every matrix.

    # torchrun --nproc-per-node 2 story.py
    mesh = init_device_mesh("cpu", (2,))            # or "cuda", a GPU for each process
    llm = tensor_parallel.load("meta-llama/Llama-3.2-1B-Instruct", mesh)
    result = llm.generate("Once upon a time")       # in every process, with the same result
    if mesh.get_rank() == 0:
        print(result.text)

The input projections of attention and mlp (q, k, v, gate, up) are column-parallel: each process has
the weights of some outputs and computes them without communication. The output projections (o,
down) are row-parallel: each process has the weights of some inputs, and an all-reduce sums the
partial results. So a transformer block needs two all-reduces of the hidden size, one after
attention and one after the mlp, and each process runs the code of `model.py` with fewer heads.
(Megatron-LM, Shoeybi et al. 2019)

Every process must run the same script with the same requests in the same order, because all
processes step together; the server, whose requests arrive at any time, is not supported. Merge
adapters first, and do not use `quantize` or `optimize`: only floating-point layers can be sharded.
Not yet run on several GPUs.
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

from llama32.checkpoint.hub import resolve
from llama32.checkpoint.layouts import empty_model
from llama32.checkpoint.reader import Checkpoint, inspect
from llama32.checkpoint.tensor_files import MappedFiles, summarize
from llama32.config import LlamaConfig
from llama32.engine import cache_size
from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.llm.loading import assemble
from llama32.model import Llama

logger = logging.getLogger(__name__)

# "Columnwise" and "rowwise" refer to W of shape (inputs, outputs) in x @ W; PyTorch stores W
# transposed. Embedding and head are both sharded along the vocabulary, so they can stay tied. Only
# one process has the embedding of a given token, and all others add zeros in the all-reduce; the
# logits of all processes are concatenated (all-gather).
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
    """Keep only this process's shard of a model, in place; all processes must pass the same model.

    `model.config` then describes the shard, with fewer heads, so a cache built from the config is
    this process's share of the cache and the engine runs unchanged. Raises ValueError, and changes
    nothing, if the sizes are not divisible by the number of processes or a layer is not a
    plain floating-point layer.
    """
    config = shard_config(model.config, mesh)
    if odd := [
        name for name, part in model.named_modules() if is_in_plan(name) and not is_shardable(part)
    ]:
        raise ValueError(
            f"parallel: {summarize(odd)}: only plain floating-point layers can be sharded; merge "
            "or remove adapters, and use neither quantize nor optimize"
        )
    is_tied = model.lm_head.weight is model.embed.weight
    parallelize_module(model, mesh, PLAN, src_data_rank=None)  # None: send no weights
    if is_tied:
        model.lm_head.weight = model.embed.weight
    for name, part in model.named_modules():
        if is_in_plan(name):
            part.register_forward_hook(wait_for_sum)
    model.config = config
    return model


def shard_config(config: LlamaConfig, mesh: DeviceMesh) -> LlamaConfig:
    """Return the config of a shard: fewer heads, and a narrower mlp.

    Raises ValueError if the mesh has several dimensions or the sizes do not divide evenly.
    """
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ("tp",)
        raise ValueError(
            f"parallel: the mesh has {mesh.ndim} dimensions, allowed: 1; pass mesh[{names[-1]!r}]"
        )
    H, K, F = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    n = mesh.size()
    if K % n or F % n:
        allowed = ", ".join(str(i) for i in range(1, K + 1) if not (K % i or F % i))
        raise ValueError(
            f"parallel: {K} key/value heads and an mlp width of {F} do not divide evenly among {n} "
            f"processes, allowed: {allowed}. To use more processes, run several copies of the "
            f"model, each on one dimension of a two-dimensional mesh"
        )
    return replace(
        config, num_attention_heads=H // n, num_key_value_heads=K // n, intermediate_size=F // n
    )


def load_shard(
    name: str | Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
) -> Llama:
    """Load this process's shard of a checkpoint; the rest is never in memory.

    A shard of a row-parallel weight is a part of every row in the file: the operating system may
    read the whole matrix from disk, but only the shard is copied. The checkpoint may have either
    layout and any number of files. Raises ValueError, with a one-line message, for damaged or
    quantized checkpoints.
    """
    checkpoint = inspect(resolve(name), rope_factor=rope_factor)
    logger.info("%s, in %d shards", checkpoint, mesh.size())
    if checkpoint.config.quantization is not None:
        raise ValueError(
            f"{checkpoint.folder}: weights in {checkpoint.config.quantization} cannot be sharded; "
            "load the unquantized checkpoint"
        )
    empty = empty_model(checkpoint.config).to(dtype or checkpoint.dtype)
    model = parallelize(empty, mesh).to_empty(device=mesh.device_type)
    read_shard(model, checkpoint)
    return model


@torch.no_grad()
def read_shard(model: Llama, checkpoint: Checkpoint) -> None:
    """Copy this process's shard of every weight from the files; warn about NaN and infinity."""
    files = MappedFiles(budget=checkpoint.nbytes // 32)  # at most 3% more memory, in 32 mappings
    broken = []
    for name, stored in checkpoint.tensors.items():
        shard, axis, start = local_shard(model.get_parameter(name))
        stored.copy_to(shard, files, axis, start)
        if not torch.stack(shard.aminmax()).isfinite().all():
            broken.append(stored.name)
    if broken:
        warnings.warn(f"{checkpoint.folder}: NaN or infinity in {summarize(broken)}", stacklevel=3)


def local_shard(weight: Tensor) -> tuple[Tensor, int, int]:
    """Return the local shard of a weight, the sharded axis, and the shard's start on the axis."""
    if not isinstance(weight, DTensor):
        return weight, 0, 0
    axis = weight.placements[0].dim  # pyright: ignore[reportAttributeAccessIssue]
    size = -(-weight.shape[axis] // weight.device_mesh.size())  # the last shard may be smaller
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
    """Load a sharded checkpoint with tokenizer, chat format and engine, as `llama32.load` does.

    Every process must pass the same requests and gets the same results.
    """
    folder = resolve(name)
    model = load_shard(folder, mesh, dtype=dtype, rope_factor=rope_factor)
    settings = agree_on_settings(engine or EngineSettings(), model, mesh)
    return assemble(folder, model, chat_style, settings)


def agree_on_settings(settings: EngineSettings, model: Llama, mesh: DeviceMesh) -> EngineSettings:
    """Return settings with which the engines of all processes schedule the same steps.

    The cache has as many pages as the process with the least memory can hold, and all processes
    share a seed for requests without a seed.
    """
    seed = randbits(62) if settings.seed is None else settings.seed
    least = torch.tensor([cache_size.num_pages(model, settings), seed], device=mesh.device_type)
    distributed.all_reduce(least, distributed.ReduceOp.MIN, mesh.get_group())
    pages, seed = least.tolist()
    tokens = pages * cache_size.page_size(model, settings)
    return replace(settings, cache_tokens=tokens, cache_bytes=None, seed=seed)


def wait_for_sum(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
    """Wait for the result of a collective, as a forward hook.

    PyTorch returns the result of an asynchronous collective early and waits at the first use. The
    engine never uses the output of prefill, so nothing would wait for the last collective. Training
    uses every result, and waiting would cut the autograd graph.
    """
    if isinstance(x, AsyncCollectiveTensor) and not x.requires_grad:
        return x.wait()
    return x


def is_in_plan(name: str) -> bool:
    """True if the plan shards the module with the given name."""
    return any(fnmatchcase(name, pattern) for pattern in PLAN)


def is_shardable(module: nn.Module) -> bool:
    """True if PyTorch can shard a module."""
    return isinstance(module, nn.Linear | nn.Embedding)
