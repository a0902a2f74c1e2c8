"""Packed forms of quantized layers: by products of integers, or by turning them into floats."""

import warnings
from typing import ClassVar

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from llama32.adapt.packed import PackedLinear, has_fbgemm, on_x86
from llama32.adapt.quantized import GROUP, Int4Linear, Int8Linear, Layer

EXACT_ROWS = 64


class PackedInt8Linear(PackedLinear):
    """What all forms of int8 layers have: a scale for each row."""

    def __init__(self, leaf: Int8Linear) -> None:
        super().__init__(leaf)
        self.scale = leaf.scale

    def integers(self) -> Int8[Tensor, "out in"]:
        """The weight, but for its scale."""
        raise NotImplementedError

    def unpacked(self) -> Float[Tensor, "out in"]:
        return Int8Linear(self.integers(), self.scale).dequantized()


class RowInt8Linear(PackedInt8Linear):
    """Integers times integers: each row of the activations is rounded to integers, too, in steps of
    its own.

    With one step for all rows, as in PyTorch's dynamic quantization, a row would depend on its
    company, and lose bits to the largest of them. Integers add up exactly, so here a row has the
    same bits in any company.

    With `fine`, what was rounded off is rounded in smaller steps and multiplied as well, as more
    rows of the same product: while few rows are bound by memory it costs next to nothing, and for
    many twice the arithmetic. (The split of LLM.int8, Dettmers et al. 2022, by value, not by
    column)
    """

    bits: ClassVar[int] = 8  # of the activations
    PIECE: ClassVar[int] = 128  # rows at a time, so that what is between stays in a cache
    # Which layers are made fine. A few inputs of the first are far larger than the rest, a product
    # of two activations each; and of the other comes every logit.
    FINE: ClassVar[tuple[str, ...]] = ("down_proj", "lm_head")

    def __init__(self, leaf: Int8Linear, *, fine: bool = False) -> None:
        super().__init__(leaf)
        self.fine = fine

    @property
    def top(self) -> int:
        """The largest integer that stands for an activation."""
        return 2 ** (self.bits - 1) - 1

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = x.new_empty(x.shape[:-1].numel(), self.shape[0])
        pieces = x.reshape(-1, x.shape[-1]).split(self.PIECE)
        for piece, rows in zip(pieces, y.split(self.PIECE), strict=True):
            integers, step = self.round(piece)
            sums = self.product(integers)
            if self.fine:
                sums, rest = sums.chunk(2)
                sums = sums.add_(rest, alpha=1 / (2 * self.top))
            torch.mul(sums, step, out=rows)
        return y.view(*x.shape[:-1], self.shape[0])

    def round(self, x: Float[Tensor, "n in"]) -> tuple[Tensor, Float[Tensor, "n 1"]]:
        """Integers, and the step from one to the next; with `fine` the rest in rows behind."""
        wide = x.float()
        step = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / self.top
        exact = wide / step
        if not self.fine:
            return self.encode(exact.round_()), step
        steps = exact.round()
        rest = exact.sub_(steps).mul_(2 * self.top).round_()  # of half a step at most
        return self.encode(torch.cat([steps, rest])), step

    def encode(self, steps: Float[Tensor, "n in"]) -> Tensor:
        """As `product` takes them."""
        return steps

    def product(self, integers: Tensor) -> Float[Tensor, "n out"]:
        """Of integers, at most `top` to either side, and the weight."""
        raise NotImplementedError

    @classmethod
    def is_exact(cls) -> bool:
        """Whether sums are what they should be. Without instructions for it some kernels add pairs
        of products in 16 bits, where the largest do not fit."""
        ones = torch.full((EXACT_ROWS, 256), 127, dtype=torch.int8)
        layer = cls(Int8Linear(ones, torch.ones(len(ones))))
        steps = torch.full((3, 256), float(layer.top))
        return bool((layer.product(layer.encode(steps)) == 256 * 127 * layer.top).all())


class OneDNNInt8Linear(RowInt8Linear):
    """By oneDNN, with its instructions for dot products of bytes."""

    title = "oneDNN, int8 activations by row"

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        return type(leaf) is Int8Linear and on_x86(leaf) and cls.is_exact()

    def __init__(self, leaf: Int8Linear, *, fine: bool = False) -> None:
        super().__init__(leaf, fine=fine)
        self.packed = torch.ops.onednn.qlinear_prepack(leaf.weight, [1, leaf.weight.shape[1]])
        self.zeros = torch.zeros(len(leaf.weight), dtype=torch.int64)

    def encode(self, steps: Float[Tensor, "n in"]) -> Tensor:
        return steps.add_(self.top + 1).to(torch.uint8)

    def product(self, integers: Tensor) -> Float[Tensor, "n out"]:
        return torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, self.top + 1, self.packed, self.scale, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip

    def integers(self) -> Int8[Tensor, "out in"]:
        return self.packed.to_dense().mT.contiguous()


class FBGEMMInt8Linear(RowInt8Linear):
    """By FBGEMM."""

    title = "FBGEMM, int8 activations by row"

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        return type(leaf) is Int8Linear and has_fbgemm(leaf) and cls.is_exact()

    def __init__(self, leaf: Int8Linear, *, fine: bool = False) -> None:
        super().__init__(leaf, fine=fine)
        zeros = torch.zeros(len(leaf.weight), dtype=torch.int64)
        with warnings.catch_warnings():  # of the tensor type: `has_fbgemm` looks whether it is left
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            make = torch._make_per_channel_quantized_tensor  # pyright: ignore
            weight = make(leaf.weight, leaf.scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def product(self, integers: Tensor) -> Float[Tensor, "n out"]:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return multiply(integers, 1.0, self.top + 1, self.packed)

    def integers(self) -> Int8[Tensor, "out in"]:
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()


class FBGEMMInt7Linear(FBGEMMInt8Linear):
    """With a bit less, so that no pair of products overflows where FBGEMM adds them in 16 bits."""

    title = "FBGEMM, 7-bit activations by row"
    bits = 7
    FINE = ("_proj", "lm_head")  # all


class WeightOnlyInt8Linear(PackedInt8Linear):
    """Bytes that are turned to floats as they are read: exact in the activations, slow for many."""

    title = "int8 weights, float activations"

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        if type(leaf) is not Int8Linear or leaf.weight.device.type != "cpu":
            return False
        # What PyTorch reads at once; of a rest it would read beyond the weight's end.
        return leaf.in_features % 32 == 0

    def __init__(self, leaf: Int8Linear) -> None:
        super().__init__(leaf)
        self.packed = leaf.weight

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scale.type_as(rows))
        return y.view(*x.shape[:-1], self.shape[0])

    def integers(self) -> Int8[Tensor, "out in"]:
        return self.packed


class CPUInt4Linear(PackedLinear):
    """Four bits, turned to bf16 as they are read."""

    title = "int4 weights, bf16 activations"

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        if type(leaf) is not Int4Linear or leaf.weight.device.type != "cpu":
            return False
        return leaf.weight.shape[0] % 16 == 0

    def __init__(self, leaf: Int4Linear) -> None:
        super().__init__(leaf)
        self.packed = self.pack(leaf)
        self.scales = torch.stack([leaf.scale, leaf.zero], dim=-1).transpose(0, 1).contiguous()

    def pack(self, leaf: Int4Linear) -> Tensor:
        """The integers, as `product` takes them."""
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(leaf.integers.int(), 1)

    def product(self, rows: BFloat16[Tensor, "n in"]) -> BFloat16[Tensor, "n out"]:
        """Of few rows or many."""
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows, self.packed, GROUP, self.scales)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = self.product(x.reshape(-1, x.shape[-1]).bfloat16()).type_as(x)
        return y.view(*x.shape[:-1], self.shape[0])
