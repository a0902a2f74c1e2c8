"""Linear layers in a library's own memory order: the same weights, read at full speed.

What PyTorch makes of a row-major weight depends on the processor: of bf16 it reads 60% of what the
memory delivers where there are instructions for it, and emulates it, slowly, where there are none.
The libraries inside PyTorch do better with a weight that they have laid out themselves. Each form
here takes the place of a leaf and keeps its weight once. Which is fastest is found out by trying
(`optimize.py`); whether one may be used at all, `fits` tells.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama32.adapt.quantized import Layer


class PackedLinear(nn.Module):
    """Stands in for the leaf that it is made of, which can then be let go. It stays where it is: a
    model that is packed can be neither moved nor cast."""

    title: ClassVar[str]
    in_fp32: ClassVar[bool] = False  # whether it computes so whatever comes in
    packed: Any

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        """Whether this machine, and this version of PyTorch, can do it for such a leaf."""
        raise NotImplementedError

    def __init__(self, leaf: Layer) -> None:
        super().__init__()
        self.shape = leaf.weight.shape
        self.nbytes = sum(x.nbytes for x in (*leaf.parameters(), *leaf.buffers()))

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        if x.requires_grad and torch.is_grad_enabled():  # none would come back, and nobody notice
            raise RuntimeError(
                "a packed layer has no gradient: train the model as it was before it was optimized"
            )
        return self.multiply(x)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        """The product with the weight."""
        raise NotImplementedError

    def unpacked(self) -> Float[Tensor, "out in"]:
        """The weight as it was."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """As printed, and for code that asks whether two layers compute alike."""
        return f"{self.title}, {[*self.shape]}"


class OneDNNLinear(PackedLinear):
    """oneDNN's blocks, in the dtype of the weight."""

    title = "oneDNN"

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        if type(leaf) is not nn.Linear or not on_x86(leaf):
            return False
        supports_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return leaf.weight.dtype == torch.float32 or (
            leaf.weight.dtype == torch.bfloat16 and supports_bf16
        )

    def __init__(self, leaf: nn.Linear) -> None:
        super().__init__(leaf)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(leaf.weight.detach(), 1)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def unpacked(self) -> Float[Tensor, "out in"]:
        return self.packed.to_dense()


class FBGEMMLinear(PackedLinear):
    """FBGEMM's fp16 weights with fp32 activations: for processors without bf16 instructions.

    fp16 has three bits more than bf16 and a smaller range: beyond 65504 it has no numbers, so such
    weights are refused; below 6e-5 it is the coarser of the two, by at most 3e-8.
    """

    title = "FBGEMM, fp16 weights"
    in_fp32 = True

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        has_16_bits = leaf.weight.dtype in (torch.bfloat16, torch.float16)
        return type(leaf) is nn.Linear and has_16_bits and has_fbgemm(leaf)

    def __init__(self, leaf: nn.Linear) -> None:
        super().__init__(leaf)
        weight = leaf.weight.detach().float()
        if not weight.abs().amax() <= torch.finfo(torch.float16).max:
            raise ValueError("a weight is beyond what fp16 can hold, 65504")
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).type_as(x)

    def unpacked(self) -> Float[Tensor, "out in"]:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]


class TiledLinear(PackedLinear):
    """The weight as it is. Many rows at once are multiplied in fp32, a tile of the weight after
    the other: what is left where a processor has no 16-bit instructions and no library helps."""

    title = "fp32 tiles"
    TILE = 1024
    FEW = 8  # rows, for which turning the weight into fp32 would cost more than it saves

    @classmethod
    def fits(cls, leaf: Layer) -> bool:
        has_16_bits = leaf.weight.dtype in (torch.bfloat16, torch.float16)
        return type(leaf) is nn.Linear and has_16_bits and leaf.weight.device.type == "cpu"

    def __init__(self, leaf: nn.Linear) -> None:
        super().__init__(leaf)
        self.packed = leaf.weight.detach()

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        if x.shape[:-1].numel() <= self.FEW:
            return nn.functional.linear(x, self.packed)
        wide = x.float()
        tiles = [wide @ tile.float().mT for tile in self.packed.split(self.TILE)]
        return torch.cat(tiles, dim=-1).type_as(x)

    def unpacked(self) -> Float[Tensor, "out in"]:
        return self.packed


def on_x86(leaf: Layer) -> bool:
    """Whether oneDNN's layouts are there for it: `torch.compile` uses them on a CPU."""
    ops = "_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"
    return (
        leaf.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ops)
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
    )


def has_fbgemm(leaf: Layer) -> bool:
    """Whether FBGEMM's layouts are there: an old corner of PyTorch, which may go away."""
    ops = "linear_prepack_fp16", "linear_with_input_q_dq_qweight_dq_output_fp32"
    return (
        leaf.weight.device.type == "cpu"
        and torch.backends.quantized.engine in ("x86", "fbgemm")
        and hasattr(torch, "_make_per_channel_quantized_tensor")
        and all(hasattr(torch.ops.quantized, name) for name in ops)
    )
