"""GPU kernels, as far as a CPU can check them; tests/gpu/ runs on a GPU."""

import pytest
import torch
from torch import nn

from llama32.kernels.autotune import KERNELS
from llama32.kernels.packed_cuda import (
    CUDAFloat8Linear,
    CUDAInt4Linear,
    CUDAInt8Linear,
    device_supports,
)
from llama32.kernels.packed_int import OneDNNInt8Linear
from llama32.quantization.quantized_linear import Float8Linear, Int4Linear, Int8Linear

GPU_KERNELS = CUDAInt8Linear, CUDAInt4Linear, CUDAFloat8Linear


def weight(rows: int = 48, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def inputs(rows: int) -> torch.Tensor:
    sizes = torch.logspace(-2, 2, max(rows, 1))[:rows, None]
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)) * sizes


@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_gpu_kernels_support_no_layer_on_a_cpu(kernel):
    for layer in (nn.Linear(64, 64), *(x.from_float(weight()) for x in (Int8Linear, Int4Linear))):
        assert not kernel.supports(layer)
    assert kernel in KERNELS


def test_a_gpu_needs_the_compute_capability_and_sizes_must_divide(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    gpu = torch.device("cuda")
    assert device_supports(gpu, (64, 32), (8, 0), 8)
    assert not device_supports(torch.device("cpu"), (64, 32), (8, 0), 8)
    assert not device_supports(gpu, (64, 32), (8, 9), 8)
    assert not device_supports(gpu, (60, 32), (8, 0), 8)
    assert not device_supports(gpu, (64, 36), (8, 0), 8)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 8, 40])
def test_int8_products_match_the_cpu_kernel(rows, residual):
    layer = Int8Linear.from_float(weight())
    if not OneDNNInt8Linear.supports(layer):
        pytest.skip("not on this machine")
    x = inputs(rows).view(1, rows, 64)
    output = CUDAInt8Linear(layer, residual=residual)(x)
    torch.testing.assert_close(output, OneDNNInt8Linear(layer, residual=residual)(x))
    assert torch.equal(CUDAInt8Linear(layer).unpacked(), layer.dequantized())


def test_float8_products_use_the_scales_of_both_factors(monkeypatch):
    """With a CPU implementation of `_scaled_mm` as documented."""

    def product(a, b, *, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert not b.is_contiguous()  # column-major, as the GPU requires
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", product)
    layer, x = Float8Linear.from_float(weight()), inputs(5).view(1, 5, 64)
    output = CUDAFloat8Linear(layer)(x)
    rounded = Float8Linear.from_float(x[0]).dequantized()
    expected = (rounded @ layer.dequantized().mT).bfloat16().float()
    torch.testing.assert_close(output[0], expected)
    assert output.dtype == torch.float32
    assert torch.equal(CUDAFloat8Linear(layer).unpacked(), layer.dequantized())


def test_int4_weights_are_packed_with_the_first_value_in_the_high_bits(monkeypatch):
    """The byte order of tinygemm, with the largest tile count that divides a row."""
    packed = []

    def pack(weight, tiles):
        packed.append((weight, tiles))
        return weight

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack)
    for columns, tiles in [(64, 4), (128, 8), (96, 2), (32, 2)]:
        layer = Int4Linear.from_float(weight(8, columns))
        CUDAInt4Linear(layer)
        bytes_, packed_tiles = packed.pop()
        assert packed_tiles == tiles
        assert bytes_.dtype == torch.uint8
        pairs = torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten(-2)
        assert torch.equal(pairs, layer.integers)
