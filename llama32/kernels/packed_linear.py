"""Packed linear layers: weights in a library's own memory order, read at full speed.

The speed of PyTorch's product with a row-major bf16 weight depends on the processor: with bf16
instructions it reads at 60% of the memory bandwidth, without them it emulates bf16 slowly. The
libraries inside PyTorch are faster with a weight in their own layout. Each kernel here replaces a
linear layer and keeps one copy of the weight. `supports` tells whether a kernel can be used, and
`autotune.py` times the supported kernels to find the fastest.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama32.quantization.quantized_linear import LinearLayer


class PackedLinear(nn.Module):
    """Base of the kernels: a linear layer with a packed copy of the weight.

    The original layer can be released afterwards. A packed model can be neither moved nor cast.
    """

    title: ClassVar[str]
    computes_in_fp32: ClassVar[bool] = False  # whatever the dtype of the input
    packed: Any

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        """True if this machine and this version of PyTorch can run the kernel for a layer."""
        raise NotImplementedError

    def __init__(self, layer: LinearLayer) -> None:
        super().__init__()
        self.shape = layer.weight.shape
        self.nbytes = sum(x.nbytes for x in (*layer.parameters(), *layer.buffers()))

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        if x.requires_grad and torch.is_grad_enabled():  # the gradient would be lost silently
            raise RuntimeError("a packed layer has no gradient: train the model before `optimize`")
        return self.multiply(x)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        """Return the product of `x` and the transposed weight."""
        raise NotImplementedError

    def unpacked(self) -> Float[Tensor, "out in"]:
        """Return the weight in row-major order."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return title and shape: for `repr`, and to compare whether two layers compute alike."""
        return f"{self.title}, {[*self.shape]}"


class OneDNNLinear(PackedLinear):
    """oneDNN's tiled layout, in the dtype of the weight."""

    title = "oneDNN"

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        if type(layer) is not nn.Linear or not has_onednn(layer):
            return False
        supports_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return layer.weight.dtype == torch.float32 or (
            layer.weight.dtype == torch.bfloat16 and supports_bf16
        )

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def unpacked(self) -> Float[Tensor, "out in"]:
        return self.packed.to_dense()


class FBGEMMLinear(PackedLinear):
    """FBGEMM's fp16 weights with fp32 activations: for processors without bf16 instructions.

    fp16 has three bits more than bf16, but a smaller range: weights beyond 65504 raise ValueError,
    and below 6e-5 fp16 is the coarser format, with an error of at most 3e-8.
    """

    title = "FBGEMM, fp16 weights"
    computes_in_fp32 = True

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        has_16_bits = layer.weight.dtype in (torch.bfloat16, torch.float16)
        return type(layer) is nn.Linear and has_16_bits and has_fbgemm(layer)

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().float()
        if not weight.abs().amax() <= torch.finfo(torch.float16).max:
            raise ValueError(
                f"FBGEMM: a weight has magnitude {weight.abs().amax():g}, beyond what fp16 can "
                "hold, 65504"
            )
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).type_as(x)

    def unpacked(self) -> Float[Tensor, "out in"]:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]


class TiledLinear(PackedLinear):
    """The 16-bit weight, multiplied in fp32 tile by tile if there are many rows.

    The fallback for a processor without 16-bit instructions where no library supports the layer.
    """

    title = "fp32 tiles"
    TILE = 1024  # weight rows
    MAX_UNTILED_ROWS = 8  # up to here, converting the weight costs more time than fp32 saves

    @classmethod
    def supports(cls, layer: LinearLayer) -> bool:
        has_16_bits = layer.weight.dtype in (torch.bfloat16, torch.float16)
        return type(layer) is nn.Linear and has_16_bits and layer.weight.device.type == "cpu"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.packed = layer.weight.detach()

    def multiply(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        if x.shape[:-1].numel() <= self.MAX_UNTILED_ROWS:
            return nn.functional.linear(x, self.packed)
        upcast = x.float()
        tiles = [upcast @ tile.float().mT for tile in self.packed.split(self.TILE)]
        return torch.cat(tiles, dim=-1).type_as(x)

    def unpacked(self) -> Float[Tensor, "out in"]:
        return self.packed


def has_onednn(layer: LinearLayer) -> bool:
    """True if PyTorch has oneDNN's layouts for the layer; `torch.compile` uses them on a CPU."""
    ops = "_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"
    return (
        layer.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ops)
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
    )


def has_fbgemm(layer: LinearLayer) -> bool:
    """True if PyTorch has FBGEMM's layouts for the layer; a later version may drop them."""
    ops = "linear_prepack_fp16", "linear_with_input_q_dq_qweight_dq_output_fp32"
    return (
        layer.weight.device.type == "cpu"
        and torch.backends.quantized.engine in ("x86", "fbgemm")
        and hasattr(torch, "_make_per_channel_quantized_tensor")
        and all(hasattr(torch.ops.quantized, name) for name in ops)
    )
