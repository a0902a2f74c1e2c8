"""Autotuner: times each kernel on a slice of the weight and keeps the fastest.

There is no list of processors: `supports` of each kernel tells whether this machine can run a
layer. For layers in 16 or 32 bits, all candidates compute the same product within the rounding of
the dtype, so the race decides the speed and the last bits: two machines, or two runs, may select
different kernels. Quantized layers are not raced, because kernels differ in how activations are
rounded: a layer gets the first supported kernel in `KERNELS`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama32.kernels.fused_projections import siblings, split_projection
from llama32.kernels.packed_cuda import CUDAFloat8Linear, CUDAInt4Linear, CUDAInt8Linear
from llama32.kernels.packed_int import (
    CPUInt4Linear,
    FBGEMMInt7Linear,
    FBGEMMInt8Linear,
    OneDNNInt8Linear,
    RowInt8Linear,
    WeightOnlyInt8Linear,
)
from llama32.kernels.packed_linear import FBGEMMLinear, OneDNNLinear, PackedLinear, TiledLinear
from llama32.model import Llama
from llama32.quantization.quantized_linear import (
    LinearLayer,
    QuantizedLinear,
    concat_rows,
    slice_rows,
)
from llama32.quantization.tied_embedding import linear_layer_names

Kernel = type[PackedLinear]
KERNELS: tuple[Kernel, ...] = (
    OneDNNLinear,
    FBGEMMLinear,
    TiledLinear,
    OneDNNInt8Linear,
    FBGEMMInt8Linear,
    FBGEMMInt7Linear,
    WeightOnlyInt8Linear,
    CPUInt4Linear,
    CUDAInt8Linear,
    CUDAInt4Linear,
    CUDAFloat8Linear,
)
ROWS = 1, 8, 128  # one request decoding, several, and a prompt: a kernel is timed on each
PREFILL_ROWS = 128
REPEATS = 3
SAMPLE_ROWS, SAMPLE_COPIES = 4096, 4  # rows per slice, and slices: together larger than the caches


@dataclass(frozen=True)
class Timing:
    """Seconds per product of a kernel, for each row count in `ROWS`."""

    kernel: Kernel | None  # None: the unpacked layer
    seconds: tuple[float, ...]

    @property
    def title(self) -> str:
        return self.kernel.title if self.kernel else "unpacked"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel for all layers of one kind, with the timings behind the choice."""

    kind: str
    timings: Sequence[Timing]

    @property
    def best(self) -> Timing:
        """The timing with the lowest product of seconds: every row count has the same weight."""
        return min(self.timings, key=lambda timing: math.prod(timing.seconds))

    def __str__(self) -> str:
        best, unpacked = self.best, self.timings[0]
        if len(self.timings) == 1:
            return f"{self.kind}: {best.title}"
        times = zip(ROWS, unpacked.seconds, best.seconds, strict=True)
        gains = ", ".join(f"{before / after:.1f}x at {n}" for n, before, after in times)
        slower = ", ".join(t.title for t in self.timings if t is not best)
        return f"{self.kind}: {best.title} ({gains} rows), of {len(self.timings)} timed: {slower}"


@dataclass
class Autotuner:
    """Replaces linear layers by their fastest kernels and records the choices by layer kind."""

    choices: dict[str, KernelChoice] = field(default_factory=dict)

    def replace(self, model: Llama, name: str) -> None:
        """Replace a linear layer, together with all layers of the same input.

        Layers with the same input become a single product (`fused_projections`). The group waits
        until all its weights are loaded (none on the meta device). Raises ValueError if a layer
        has hooks.
        """
        layer = model.get_submodule(name)
        if not isinstance(layer, LinearLayer):
            return
        group = {sibling: model.get_submodule(sibling) for sibling in siblings(name)}
        if any(
            isinstance(x, LinearLayer) and x.weight.device.type == "meta" for x in group.values()
        ):
            return
        if not group or {type(x) for x in group.values()} != {type(layer)}:
            group = {name: layer}
        layers = [x for x in group.values() if isinstance(x, LinearLayer)]
        whole = concat_rows(layers)
        kernel = self.select_kernel(layer, model.norm.weight.dtype).best.kernel
        if kernel is None or not kernel.supports(whole):  # the timed layer may have other sizes
            return
        for sibling, part in group.items():
            if part._forward_hooks or part._forward_pre_hooks:
                raise ValueError(
                    f"optimize: {sibling} has hooks that would be lost; remove the hooks first"
                )
        has_residual = issubclass(kernel, RowInt8Linear) and name.endswith(kernel.RESIDUAL_LAYERS)
        pack = partial(kernel, **{"residual": True} if has_residual else {})
        if len(group) == 1:
            model.set_submodule(name, pack(layer))
        else:
            sizes = [len(x.weight) for x in layers]
            for sibling, part in zip(group, split_projection(pack(whole), sizes), strict=True):
                model.set_submodule(sibling, part)

    def select_kernel(self, layer: LinearLayer, dtype: torch.dtype) -> KernelChoice:
        """Return the choice for this kind of layer; the first layer of a kind is timed."""
        kind = layer_kind(layer)
        if kind not in self.choices:
            self.choices[kind] = KernelChoice(kind, time_kernels(layer, dtype))
        return self.choices[kind]

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices.values()))


def optimize(model: Llama) -> Autotuner:
    """Replace every linear layer by its fastest kernel on this machine.

    Print the returned autotuner to see the choices. The model is then for inference only: weights
    are no longer parameters and cannot be saved. Results stay the same within the rounding of the
    dtype; int8 layers also round activations, which adds an error of about 1%. Each layer is
    released once packed, so memory peaks at the model plus its largest layer. An embedding tied to
    the head becomes a separate copy; `load(..., optimize=True)` packs each layer while loading and
    leaves the embedding in its file.
    """
    tuner = Autotuner()
    for name in linear_layer_names(model):
        tuner.replace(model, name)
    model.requires_grad_(False)
    return tuner


def layer_kind(layer: LinearLayer) -> str:
    """Return layer class and weight dtype: layers of one kind share a kernel."""
    return f"{type(layer).__name__}, {str(layer.weight.dtype).removeprefix('torch.')}"


def split_rows(layer: LinearLayer, size: int) -> Iterator[LinearLayer]:
    """Yield slices of a layer with at most `size` weight rows each."""
    for start in range(0, len(layer.weight), size):
        yield slice_rows(layer, slice(start, start + size))


@torch.inference_mode()
def time_kernels(layer: LinearLayer, dtype: torch.dtype) -> list[Timing]:
    """Time the unpacked layer and every supported kernel on slices of its weight.

    Kernels take turns, `REPEATS` times for each row count; the fastest turn counts. A quantized
    layer is not timed: the result is its first supported kernel.
    """
    slices = list(islice(split_rows(layer, SAMPLE_ROWS), SAMPLE_COPIES))
    supported = [kernel for kernel in KERNELS if kernel.supports(slices[0])]
    if isinstance(layer, QuantizedLinear):
        return [Timing(supported[0] if supported else None, (0.0,) * len(ROWS))]
    candidates: dict[Kernel | None, Sequence[nn.Module]] = {None: slices}
    candidates |= {kernel: [kernel(part) for part in slices] for kernel in supported}
    best = {kernel: [math.inf] * len(ROWS) for kernel in candidates}
    for i, n in enumerate(ROWS if supported else ()):
        x = torch.randn(n, layer.in_features).to(layer.weight.device, dtype)
        for _ in range(REPEATS):
            for kernel, parts in candidates.items():
                best[kernel][i] = min(best[kernel][i], time_products(parts, x))
    return [Timing(kernel, tuple(seconds)) for kernel, seconds in best.items()]


def time_products(parts: Sequence[nn.Module], x: Float[Tensor, "rows in"]) -> float:
    """Return the mean seconds per product.

    Few rows are bound by memory, so all slices are multiplied, more than the caches hold; for
    `PREFILL_ROWS` or more, arithmetic dominates and a single slice is enough.
    """
    timed = parts if len(x) < PREFILL_ROWS else parts[:1]
    start = time.perf_counter()
    for part in timed:
        part(x)
    return (time.perf_counter() - start) / len(timed)
