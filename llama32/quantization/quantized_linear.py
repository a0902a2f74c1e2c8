"""Quantized linear layers in plain form.

A weight is stored as small numbers with a scale for each row, or for each group along a row. The
layers here dequantize the weight, then multiply: readable, the same on every device, and slow.
Checkpoints store this form, and the fast layers in `kernels/` are tested against it.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Int8, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_SIZE = 32  # adjacent weights of a row that share a scale in int4


class QuantizedLinear(nn.Module):
    """A linear layer without bias and with a weight of few bits; all tensors are buffers."""

    weight: Tensor

    @classmethod
    def from_float(cls, weight: Float[Tensor, "out in"]) -> "QuantizedLinear":
        """Quantize to the nearest representable weight."""
        raise NotImplementedError

    def dequantized(self) -> Float[Tensor, "out in"]:
        """Return the weight in fp32."""
        raise NotImplementedError

    @property
    def in_features(self) -> int:
        """The width of the input."""
        raise NotImplementedError

    def slice_rows(self, index: slice | Int[Tensor, " n"]) -> "QuantizedLinear":
        """Return a layer with some of the rows; the first axis of every tensor is rows."""
        return type(self)(*(x[index] for x in self.buffers()))

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return F.linear(x, self.dequantized().type_as(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move the layer, but never cast: scales are few, and their precision matters."""
        original = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, x in original.items():
            setattr(self, name, x.to(self.weight.device))
        return self


LinearLayer = nn.Linear | QuantizedLinear


def slice_rows(layer: LinearLayer, index: slice) -> LinearLayer:
    """Return a layer with some of the rows; the tensors are views."""
    if isinstance(layer, QuantizedLinear):
        return layer.slice_rows(index)
    return linear_from_weight(layer.weight.detach()[index])


def concat_rows(layers: Sequence[LinearLayer]) -> LinearLayer:
    """Return one layer with the rows of several layers of the same type."""
    first = layers[0]
    if len(layers) == 1:
        return first
    if isinstance(first, QuantizedLinear):
        return type(first)(*map(torch.cat, zip(*(x.buffers() for x in layers), strict=True)))
    return linear_from_weight(torch.cat([layer.weight.detach() for layer in layers]))


def linear_from_weight(weight: Float[Tensor, "out in"]) -> nn.Linear:
    """Return a plain linear layer with the given weight."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


class ScaledLinear(QuantizedLinear):
    """One small number per weight, one scale per row: w = scale * number."""

    weight: Shaped[Tensor, "out in"]
    scale: Float[Tensor, " out"]

    def __init__(self, weight: Shaped[Tensor, "out in"], scale: Float[Tensor, " out"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def dequantized(self) -> Float[Tensor, "out in"]:
        return self.weight.float() * self.scale.unsqueeze(-1)


class Int8Linear(ScaledLinear):
    """One signed byte per weight, one scale per row: w = scale * integer.

    Symmetric, so no product needs a correction for a zero point.
    """

    weight: Int8[Tensor, "out in"]

    @classmethod
    def from_float(cls, weight: Float[Tensor, "out in"]) -> "Int8Linear":
        upcast = weight.detach().float()
        scale = upcast.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return cls((upcast / scale.unsqueeze(-1)).round().to(torch.int8), scale)


class Float8Linear(ScaledLinear):
    """One small float per weight (e4m3: 4 exponent bits, 3 fraction bits), one scale per row.

    For GPUs with fp8 products. Large weights are coarser than in int8, small weights finer.
    (FP8 Formats for Deep Learning, Micikevicius et al. 2022)
    """

    @classmethod
    def from_float(cls, weight: Float[Tensor, "out in"]) -> "Float8Linear":
        upcast = weight.detach().float()
        dtype = torch.float8_e4m3fn
        scale = upcast.abs().amax(-1).clamp_min(1e-30) / torch.finfo(dtype).max
        return cls((upcast / scale.unsqueeze(-1)).to(dtype), scale)


class Int4Linear(QuantizedLinear):
    """Four bits per weight: w = scale * (integer - 8) + zero.

    Two integers per byte, the earlier in the low bits; a scale and a zero for each group of 32
    along a row, so five bits per weight in total. (the format of `torch._weight_int4pack_mm`, with
    scales in bf16)
    """

    weight: UInt8[Tensor, "out half"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]

    def __init__(
        self,
        weight: UInt8[Tensor, "out half"],
        scale: Float[Tensor, "out groups"],
        zero: Float[Tensor, "out groups"],
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @classmethod
    def from_float(cls, weight: Float[Tensor, "out in"]) -> "Int4Linear":
        if weight.shape[1] % GROUP_SIZE:
            raise ValueError(
                f"int4: rows of {weight.shape[1]} weights, not a multiple of {GROUP_SIZE}; use int8"
            )
        groups = weight.detach().float().unflatten(-1, (-1, GROUP_SIZE))  # (out, groups, 32)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        integers = ((groups - zero.float()) / scale.float() + 8).round().clamp(0, 15)
        pairs = integers.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
        return cls(pairs[..., 0] | pairs[..., 1] << 4, scale.squeeze(-1), zero.squeeze(-1))

    @property
    def in_features(self) -> int:
        return 2 * self.weight.shape[1]

    @property
    def integers(self) -> UInt8[Tensor, "out in"]:
        """The unpacked integers, 0 to 15."""
        return torch.stack([self.weight & 15, self.weight >> 4], dim=-1).flatten(-2)

    def dequantized(self) -> Float[Tensor, "out in"]:
        groups = self.integers.unflatten(-1, (-1, GROUP_SIZE)).float() - 8
        scale, zero = self.scale.float().unsqueeze(-1), self.zero.float().unsqueeze(-1)
        return (groups * scale + zero).flatten(-2)
