"""Quantized layers on a GPU, by the products that PyTorch brings along. Not yet run on a GPU.

Weights stay in the bytes of the plain form, or are put in another order once. What a chip can do is
asked of its compute capability: 8.0 is an A100, 8.9 an L4 or RTX 4090, 9.0 an H100.
"""

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor
from torch.nn.functional import pad

from llama32.adapt.packed import PackedLinear
from llama32.adapt.packed_int import CPUInt4Linear, RowInt8Linear
from llama32.adapt.quantized import GROUP, Float8Linear, Int4Linear, Int8Linear, Layer


def on_cuda(leaf: Layer, since: tuple[int, int], multiple: int) -> bool:
    """Whether it is on such a chip or a newer one, and both its sizes are multiples."""
    return can(leaf.weight.device, (len(leaf.weight), leaf.in_features), since, multiple)


def can(
    device: torch.device, sizes: tuple[int, int], since: tuple[int, int], multiple: int
) -> bool:
    """The same by its place and its sizes alone."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < since:
        return False
    return all(size % multiple == 0 for size in sizes)


class CUDAInt8Linear(RowInt8Linear):
    """Integers times integers on tensor cores."""

    title = "cuBLAS, int8 activations by row"
    PIECE = 4096
    LEAST = 32  # rows: PyTorch asks for more than 16

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        return type(leaf) is Int8Linear and on_cuda(leaf, (8, 0), 8)

    def __init__(self, leaf: Int8Linear, *, fine: bool = False) -> None:
        super().__init__(leaf, fine=fine)
        self.packed = leaf.weight

    def encode(self, steps: Float[Tensor, "n in"]) -> Int8[Tensor, "n in"]:
        return steps.to(torch.int8)

    def product(self, integers: Int8[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        missing = max(self.LEAST - len(integers), 0)
        sums = torch.ops.aten._int_mm(pad(integers, (0, 0, 0, missing)), self.packed.mT)
        return sums[: len(integers)] * self.scale

    def integers(self) -> Int8[Tensor, "out in"]:
        return self.packed


class CUDAInt4Linear(CPUInt4Linear):
    """tinygemm: four bits, turned to bf16 as they are read."""

    title = "tinygemm, bf16 activations"
    TILES = 8, 4, 2  # of 16 columns: as many as divide a row are packed together

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        return type(leaf) is Int4Linear and on_cuda(leaf, (8, 0), 8)

    def pack(self, leaf: Int4Linear) -> Tensor:
        swapped = leaf.weight << 4 | leaf.weight >> 4  # the earlier one in the high bits
        tiles = next(tiles for tiles in self.TILES if leaf.in_features % (16 * tiles) == 0)
        return torch.ops.aten._convert_weight_to_int4pack(swapped, tiles)

    def product(self, rows: BFloat16[Tensor, "n in"]) -> BFloat16[Tensor, "n out"]:
        return torch.ops.aten._weight_int4pack_mm(rows, self.packed, GROUP, self.scales)


class CUDAFloat8Linear(PackedLinear):
    """Small floats times small floats: each row of the activations gets a scale, too."""

    title = "float8, activations by row"

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        return type(leaf) is Float8Linear and on_cuda(leaf, (8, 9), 16)

    def __init__(self, leaf: Float8Linear) -> None:
        super().__init__(leaf)
        self.packed = leaf.weight
        self.scale = leaf.scale

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        rows = Float8Linear.of(x.reshape(-1, x.shape[-1]))
        y = torch.ops.aten._scaled_mm(
            rows.weight,
            self.packed.mT,
            scale_a=rows.scale.unsqueeze(-1),
            scale_b=self.scale.unsqueeze(0),
            out_dtype=torch.bfloat16,  # the only one for scales by row
        )
        return y.type_as(x).view(*x.shape[:-1], self.shape[0])

    def unpacked(self) -> Float[Tensor, "out in"]:
        return Float8Linear(self.packed, self.scale).dequantized()
