"""Linear layers in fewer bits, in the plain form that says what they are.

A weight is kept as small numbers, with a scale for each row or for each group along a row. The
forms here turn it back into floats, then multiply: readable, the same on every device, and slow.
They are what is saved and loaded, and the oracle of the fast forms in `packed.py`.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Int8, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 32  # weights of a row that share a scale in int4


class QuantizedLinear(nn.Module):
    """A linear layer without bias, its weight in few bits; all its tensors are buffers."""

    weight: Tensor

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"]) -> "QuantizedLinear":
        """The nearest that this form can hold."""
        raise NotImplementedError

    def dequantized(self) -> Float[Tensor, "out in"]:
        """What it stands for, in fp32."""
        raise NotImplementedError

    @property
    def in_features(self) -> int:
        """The width of its inputs."""
        raise NotImplementedError

    def rows(self, chosen: slice | Int[Tensor, " n"]) -> "QuantizedLinear":
        """The same with some of its rows: every tensor begins with an axis of rows."""
        return type(self)(*(x[chosen] for x in self.buffers()))

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return F.linear(x, self.dequantized().type_as(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """A model may be cast; its scales, few and decisive, stay as they are."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, x in before.items():
            setattr(self, name, x.to(self.weight.device))
        return self


Layer = nn.Linear | QuantizedLinear


def some_rows(layer: Layer, chosen: slice) -> Layer:
    """The layer that gives some of its outputs; its tensors are views."""
    if isinstance(layer, QuantizedLinear):
        return layer.rows(chosen)
    return linear(layer.weight.detach()[chosen])


def joined(layers: Sequence[Layer]) -> Layer:
    """One layer with the rows of all, which are of one kind."""
    first = layers[0]
    if len(layers) == 1:
        return first
    if isinstance(first, QuantizedLinear):
        return type(first)(*map(torch.cat, zip(*(x.buffers() for x in layers), strict=True)))
    return linear(torch.cat([layer.weight.detach() for layer in layers]))


def linear(weight: Float[Tensor, "out in"]) -> nn.Linear:
    """A plain layer with this weight."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


class ScaledLinear(QuantizedLinear):
    """A small number for each weight, and a scale for each row: w = scale * number."""

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
    """A signed byte for each weight, and a scale for each row: w = scale * integer.

    Symmetric, so that no product needs a correction for a zero point.
    """

    weight: Int8[Tensor, "out in"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"]) -> "Int8Linear":
        wide = weight.detach().float()
        scale = wide.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return cls((wide / scale.unsqueeze(-1)).round().to(torch.int8), scale)


class Float8Linear(ScaledLinear):
    """A small float for each weight (e4m3: 4 bits of exponent, 3 of fraction), and a scale for each
    row. For GPUs that multiply them; large weights are coarser than in int8, small ones finer.

    (FP8 Formats for Deep Learning, Micikevicius et al. 2022)
    """

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"]) -> "Float8Linear":
        wide = weight.detach().float()
        dtype = torch.float8_e4m3fn
        scale = wide.abs().amax(-1).clamp_min(1e-30) / torch.finfo(dtype).max
        return cls((wide / scale.unsqueeze(-1)).to(dtype), scale)


class Int4Linear(QuantizedLinear):
    """Four bits for each weight, two in a byte, the earlier one in the low bits; a scale and a
    zero for each group of 32 along a row: w = scale * (integer - 8) + zero. Five bits in all.

    (the form of `torch._weight_int4pack_mm`, whose scales are bf16 too)
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
    def of(cls, weight: Float[Tensor, "out in"]) -> "Int4Linear":
        if weight.shape[1] % GROUP:
            raise ValueError(f"int4: rows of {weight.shape[1]} weights, not a multiple of {GROUP}")
        groups = weight.detach().float().unflatten(-1, (-1, GROUP))  # (out, groups, 32)
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
        """Each on its own, 0 to 15."""
        return torch.stack([self.weight & 15, self.weight >> 4], dim=-1).flatten(-2)

    def dequantized(self) -> Float[Tensor, "out in"]:
        groups = self.integers.unflatten(-1, (-1, GROUP)).float() - 8
        scale, zero = self.scale.float().unsqueeze(-1), self.zero.float().unsqueeze(-1)
        return (groups * scale + zero).flatten(-2)
