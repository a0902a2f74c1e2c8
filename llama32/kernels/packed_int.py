"""Packed int8 and int4 layers: integer products, or weights dequantized on the fly."""

import warnings
from typing import ClassVar

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from llama32.kernels.packed_linear import PackedLinear, has_fbgemm, has_onednn
from llama32.quantization.quantized_linear import GROUP_SIZE, Int4Linear, Int8Linear, LinearLayer

CHECK_ROWS = 64  # weight rows in the check for 16-bit overflow


class PackedInt8Linear(PackedLinear):
    """Base class of the int8 kernels: integers and a scale for each weight row."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__(layer)
        self.scale = layer.scale

    def integers(self) -> Int8[Tensor, "out in"]:
        """Return the weight without its scale."""
        raise NotImplementedError

    def unpacked(self) -> Float[Tensor, "out in"]:
        return Int8Linear(self.integers(), self.scale).dequantized()


class RowInt8Linear(PackedInt8Linear):
    """Integer products: weights and activations in int8, with a scale for each activation row.

    With one scale for all rows, as in PyTorch's dynamic quantization, a row would depend on the
    batch and lose precision to the largest row. Integer sums are exact, so a row with a scale of
    its own is batch-invariant.

    Residual quantization (`residual=True`) recovers most of the rounding error: the error of each
    activation is quantized again in steps 2 * `max_int` times finer, multiplied as extra rows of
    the same product, and added. A product of few rows is memory-bound, and the extra rows cost
    almost nothing; with many rows they double the arithmetic. (LLM.int8, Dettmers et al. 2022,
    separates the columns with outliers; residual quantization splits every value.)
    """

    bits: ClassVar[int] = 8  # of an activation
    CHUNK_ROWS: ClassVar[int] = 128  # rows multiplied at a time: intermediates fit the CPU's cache
    # Layers with residual quantization. A few inputs of `down_proj`, each the product of two
    # activations, are far larger than the rest; an error in `lm_head` is an error of the logits.
    RESIDUAL_LAYERS: ClassVar[tuple[str, ...]] = ("down_proj", "lm_head")

    def __init__(self, layer: Int8Linear, *, residual: bool = False) -> None:
        super().__init__(layer)
        self.residual = residual

    @property
    def max_int(self) -> int:
        """Largest integer that an activation is rounded to."""
        return 2 ** (self.bits - 1) - 1

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = x.new_empty(x.shape[:-1].numel(), self.shape[0])
        chunks = x.reshape(-1, x.shape[-1]).split(self.CHUNK_ROWS)
        for chunk, out in zip(chunks, y.split(self.CHUNK_ROWS), strict=True):
            integers, step = self.quantize_rows(chunk)
            sums = self.product(integers)
            if self.residual:
                sums, residual = sums.chunk(2)
                sums = sums.add_(residual, alpha=1 / (2 * self.max_int))
            torch.mul(sums, step, out=out)
        return y.view(*x.shape[:-1], self.shape[0])

    def quantize_rows(self, x: Float[Tensor, "n in"]) -> tuple[Tensor, Float[Tensor, "n 1"]]:
        """Round each row to multiples of its own step; return encoded integers and steps.

        With `residual`, the first n rows hold the rounded values and the last n rows the rounding
        errors, in units of step / (2 * `max_int`).
        """
        upcast = x.float()
        step = upcast.abs().amax(-1, keepdim=True).clamp_min(1e-30) / self.max_int
        exact = upcast / step
        if not self.residual:
            return self.encode(exact.round_()), step
        rounded = exact.round()
        # An error is at most half a step, so the scaled error is at most `max_int`.
        residual = exact.sub_(rounded).mul_(2 * self.max_int).round_()
        return self.encode(torch.cat([rounded, residual])), step

    def encode(self, rounded: Float[Tensor, "n in"]) -> Tensor:
        """Convert rounded values to the dtype and offset that `product` expects."""
        return rounded

    def product(self, integers: Tensor) -> Float[Tensor, "n out"]:
        """Multiply encoded integers, at most `max_int` in magnitude, by the weight."""
        raise NotImplementedError

    @classmethod
    def is_exact(cls) -> bool:
        """True if the largest integers are multiplied and summed without overflow.

        Without dot-product instructions some kernels add pairs of products in 16 bits, where the
        largest sums overflow.
        """
        ones = torch.full((CHECK_ROWS, 256), 127, dtype=torch.int8)
        layer = cls(Int8Linear(ones, torch.ones(len(ones))))
        largest = torch.full((3, 256), float(layer.max_int))
        return bool((layer.product(layer.encode(largest)) == 256 * 127 * layer.max_int).all())


class OneDNNInt8Linear(RowInt8Linear):
    """oneDNN, with the processor's dot-product instructions for int8."""

    title = "oneDNN, int8 activations by row"

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        return type(layer) is Int8Linear and has_onednn(layer) and cls.is_exact()

    def __init__(self, layer: Int8Linear, *, residual: bool = False) -> None:
        super().__init__(layer, residual=residual)
        self.packed = torch.ops.onednn.qlinear_prepack(layer.weight, [1, layer.weight.shape[1]])
        self.zeros = torch.zeros(len(layer.weight), dtype=torch.int64)

    def encode(self, rounded: Float[Tensor, "n in"]) -> Tensor:
        return rounded.add_(self.max_int + 1).to(torch.uint8)

    def product(self, integers: Tensor) -> Float[Tensor, "n out"]:
        return torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, self.max_int + 1, self.packed, self.scale, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip

    def integers(self) -> Int8[Tensor, "out in"]:
        return self.packed.to_dense().mT.contiguous()


class FBGEMMInt8Linear(RowInt8Linear):
    """FBGEMM's product with input quantization, called on rounded activations with a scale of 1."""

    title = "FBGEMM, int8 activations by row"

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        return type(layer) is Int8Linear and has_fbgemm(layer) and cls.is_exact()

    def __init__(self, layer: Int8Linear, *, residual: bool = False) -> None:
        super().__init__(layer, residual=residual)
        zeros = torch.zeros(len(layer.weight), dtype=torch.int64)
        # The warning says that PyTorch will remove quantized tensors; `has_fbgemm` checks for them.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            make = torch._make_per_channel_quantized_tensor  # pyright: ignore
            weight = make(layer.weight, layer.scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def product(self, integers: Tensor) -> Float[Tensor, "n out"]:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return multiply(integers, 1.0, self.max_int + 1, self.packed)

    def integers(self) -> Int8[Tensor, "out in"]:
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()


class FBGEMMInt7Linear(FBGEMMInt8Linear):
    """FBGEMM with 7-bit activations: the sum of two products always fits in 16 bits."""

    title = "FBGEMM, 7-bit activations by row"
    bits = 7
    RESIDUAL_LAYERS = ("_proj", "lm_head")  # all layers


class WeightOnlyInt8Linear(PackedInt8Linear):
    """int8 weights dequantized on the fly: activations are not rounded, many rows are slow."""

    title = "int8 weights, float activations"

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        if type(layer) is not Int8Linear or layer.weight.device.type != "cpu":
            return False
        # PyTorch reads 32 values at a time, past the end of a row if 32 does not divide the length.
        return layer.in_features % 32 == 0

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__(layer)
        self.packed = layer.weight

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scale.type_as(rows))
        return y.view(*x.shape[:-1], self.shape[0])

    def integers(self) -> Int8[Tensor, "out in"]:
        return self.packed


class CPUInt4Linear(PackedLinear):
    """int4 weights, dequantized to bf16 on the fly."""

    title = "int4 weights, bf16 activations"

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        if type(layer) is not Int4Linear or layer.weight.device.type != "cpu":
            return False
        return layer.weight.shape[0] % 16 == 0

    def __init__(self, layer: Int4Linear) -> None:
        super().__init__(layer)
        self.packed = self.pack(layer)
        self.scales = torch.stack([layer.scale, layer.zero], dim=-1).transpose(0, 1).contiguous()

    def pack(self, layer: Int4Linear) -> Tensor:
        """Return the integers in the memory order that `product` expects."""
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.integers.int(), 1)

    def product(self, rows: BFloat16[Tensor, "n in"]) -> BFloat16[Tensor, "n out"]:
        """Multiply activations by the packed weight."""
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows, self.packed, GROUP_SIZE, self.scales)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = self.product(x.reshape(-1, x.shape[-1]).bfloat16()).type_as(x)
        return y.view(*x.shape[:-1], self.shape[0])
