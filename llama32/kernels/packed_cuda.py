"""Quantized layers on a GPU, with the kernels inside PyTorch. Not yet run on a GPU.

Weights keep the bytes of the quantized layer, or are reordered once. The compute capability of a
GPU decides which kernels are available: 8.0 is an A100, 8.9 an L4 or RTX 4090, 9.0 an H100.
"""

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor
from torch.nn.functional import pad

from llama32.kernels.packed_int import CPUInt4Linear, RowInt8Linear
from llama32.kernels.packed_linear import PackedLinear
from llama32.quantization.quantized_linear import (
    GROUP_SIZE,
    Float8Linear,
    Int4Linear,
    Int8Linear,
    LinearLayer,
)


def layer_supports(layer: LinearLayer, capability: tuple[int, int], multiple: int) -> bool:
    """True if `device_supports` holds for the device and both sizes of a layer."""
    sizes = len(layer.weight), layer.in_features
    return device_supports(layer.weight.device, sizes, capability, multiple)


def device_supports(
    device: torch.device, sizes: tuple[int, int], capability: tuple[int, int], multiple: int
) -> bool:
    """True for a GPU of at least this compute capability, if all sizes divide by `multiple`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < capability:
        return False
    return all(size % multiple == 0 for size in sizes)


class CUDAInt8Linear(RowInt8Linear):
    """Products of int8 weights and int8 activations on tensor cores."""

    title = "cuBLAS, int8 activations by row"
    CHUNK_ROWS = 4096
    MIN_ROWS = 32  # shorter inputs are padded: PyTorch requires more than 16 rows

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        return type(layer) is Int8Linear and layer_supports(layer, (8, 0), 8)

    def __init__(self, layer: Int8Linear, *, residual: bool = False) -> None:
        super().__init__(layer, residual=residual)
        self.packed = layer.weight

    def encode(self, rounded: Float[Tensor, "n in"]) -> Int8[Tensor, "n in"]:
        return rounded.to(torch.int8)

    def product(self, integers: Int8[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        missing = max(self.MIN_ROWS - len(integers), 0)
        sums = torch.ops.aten._int_mm(pad(integers, (0, 0, 0, missing)), self.packed.mT)
        return sums[: len(integers)] * self.scale

    def integers(self) -> Int8[Tensor, "out in"]:
        return self.packed


class CUDAInt4Linear(CPUInt4Linear):
    """tinygemm: int4 weights, converted to bf16 while being read."""

    title = "tinygemm, bf16 activations"
    TILES = 8, 4, 2  # tiles of 16 columns packed together: the largest count that divides a row

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        return type(layer) is Int4Linear and layer_supports(layer, (8, 0), 8)

    def pack(self, layer: Int4Linear) -> Tensor:
        swapped = layer.weight << 4 | layer.weight >> 4  # tinygemm: first value in the high bits
        tiles = next(tiles for tiles in self.TILES if layer.in_features % (16 * tiles) == 0)
        return torch.ops.aten._convert_weight_to_int4pack(swapped, tiles)

    def product(self, rows: BFloat16[Tensor, "n in"]) -> BFloat16[Tensor, "n out"]:
        return torch.ops.aten._weight_int4pack_mm(rows, self.packed, GROUP_SIZE, self.scales)


class CUDAFloat8Linear(PackedLinear):
    """Products of float8 weights and float8 activations, with a scale for each row of both."""

    title = "float8, activations by row"

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        return type(layer) is Float8Linear and layer_supports(layer, (8, 9), 16)

    def __init__(self, layer: Float8Linear) -> None:
        super().__init__(layer)
        self.packed = layer.weight
        self.scale = layer.scale

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        rows = Float8Linear.from_float(x.reshape(-1, x.shape[-1]))
        y = torch.ops.aten._scaled_mm(
            rows.weight,
            self.packed.mT,
            scale_a=rows.scale.unsqueeze(-1),
            scale_b=self.scale.unsqueeze(0),
            out_dtype=torch.bfloat16,  # the only dtype allowed with scales by row
        )
        return y.type_as(x).view(*x.shape[:-1], self.shape[0])

    def unpacked(self) -> Float[Tensor, "out in"]:
        return Float8Linear(self.packed, self.scale).dequantized()
