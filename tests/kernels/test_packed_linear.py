"""Packed kernels: the plain layer's product within rounding, and the weight unpacked again."""

from typing import Any

import pytest
import torch
from torch import nn

from llama32.kernels import packed_int, packed_linear
from llama32.kernels.autotune import KERNELS
from llama32.kernels.packed_int import (
    CPUInt4Linear,
    FBGEMMInt7Linear,
    FBGEMMInt8Linear,
    OneDNNInt8Linear,
    RowInt8Linear,
    WeightOnlyInt8Linear,
)
from llama32.kernels.packed_linear import FBGEMMLinear, OneDNNLinear, TiledLinear
from llama32.quantization.quantized_linear import Int4Linear, Int8Linear

BF16 = 2.0**-8  # relative rounding error of a bf16 sum
ROWS = [0, 1, 2, 7, 8, 9, 65]


def plain(dtype: torch.dtype = torch.bfloat16, rows: int = 96, columns: int = 64) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    draw = torch.Generator().manual_seed(1)
    layer.weight = nn.Parameter(torch.randn(rows, columns, generator=draw).to(dtype))
    return layer


def inputs(rows: int, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    x = (
        torch.randn(rows, columns, generator=draw)
        * torch.logspace(-2, 2, max(rows, 1))[:rows, None]
    )
    return x.to(dtype)


def make(kernel: Any, layer: Any, **options: Any) -> Any:
    if not kernel.supports(layer):
        pytest.skip("not on this machine")
    return kernel(layer, **options)


def distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of a row, relative to the row's norm."""
    error = (output.double() - expected.double()).norm(dim=-1)
    return (error / expected.double().norm(dim=-1)).max().item() if len(output) else 0.0


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().mT


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kernel", [OneDNNLinear, FBGEMMLinear, TiledLinear])
def test_16_bit_products_are_as_accurate_as_plain_products(kernel, rows):
    layer = plain()
    x = inputs(rows)
    expected = exact(x, layer.weight)
    output = make(kernel, layer)(x)
    assert output.shape == (rows, 96)
    assert output.dtype == x.dtype
    assert distance(output, expected) <= max(2 * distance(layer(x), expected), 1e-6)


@pytest.mark.parametrize("kernel", [OneDNNLinear, FBGEMMLinear, TiledLinear])
def test_16_bit_weights_unpack_to_the_same_bits(kernel):
    layer = plain()
    assert torch.equal(make(kernel, layer).unpacked().to(layer.weight.dtype), layer.weight)


def test_fp32_weights_are_packed_by_onednn():
    layer = plain(torch.float32)
    x = inputs(5, dtype=torch.float32)
    assert distance(make(OneDNNLinear, layer)(x), exact(x, layer.weight)) < 1e-6


def test_a_weight_beyond_fp16_raises_an_error():
    layer = plain()
    make(FBGEMMLinear, layer)
    with torch.no_grad():
        layer.weight[3, 5] = 70_000
    with pytest.raises(ValueError, match="magnitude 70144, beyond what fp16 can hold"):
        FBGEMMLinear(layer)


def rounded(x: torch.Tensor, max_int: int) -> torch.Tensor:
    """Return activations rounded as for an int8 product, with a step for each row."""
    size = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / max_int
    return (x.float() / size).round().double() * size


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kernel", [OneDNNInt8Linear, FBGEMMInt8Linear, FBGEMMInt7Linear])
def test_an_int8_product_is_the_plain_product_of_rounded_activations(kernel, rows):
    layer = Int8Linear.from_float(plain().weight)
    x = inputs(rows)
    packed = make(kernel, layer)
    expected = exact(rounded(x, packed.max_int), layer.dequantized())
    assert distance(packed(x), expected) < 2 * BF16
    assert distance(packed(x.float()), expected) < 1e-6
    assert torch.equal(packed.unpacked(), layer.dequantized())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kernel", [OneDNNInt8Linear, FBGEMMInt8Linear, FBGEMMInt7Linear])
def test_residual_quantization_squares_the_relative_error(kernel, rows):
    layer = Int8Linear.from_float(plain().weight)
    packed, x = make(kernel, layer, residual=True), inputs(rows)
    assert distance(packed(x.float()), exact(x, layer.dequantized())) < 2 / packed.max_int**2


@pytest.mark.parametrize("kernel", [OneDNNInt8Linear, FBGEMMInt8Linear, FBGEMMInt7Linear])
def test_an_int8_product_is_batch_invariant(kernel):
    x = inputs(65)
    for layer in (
        make(kernel, Int8Linear.from_float(plain().weight)),
        kernel(Int8Linear.from_float(plain().weight), residual=True),
    ):
        whole = layer(x)
        for start, stop in [(0, 1), (64, 65), (3, 5), (8, 24), (1, 64)]:
            assert torch.equal(layer(x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("residual", [False, True])
def test_the_chunk_size_does_not_change_the_bits(residual, monkeypatch):
    layer = Int8Linear.from_float(plain().weight)
    packed, x = make(OneDNNInt8Linear, layer, residual=residual), inputs(65)
    whole = packed(x)
    monkeypatch.setattr(RowInt8Linear, "CHUNK_ROWS", 16)
    assert torch.equal(packed(x), whole)


def test_a_row_of_zeros_gives_zeros():
    layer = make(OneDNNInt8Linear, Int8Linear.from_float(plain().weight))
    assert layer(torch.zeros(2, 64)).eq(0).all()


def test_a_gradient_raises_an_error():
    layer = TiledLinear(plain())
    x = inputs(3).requires_grad_()
    with pytest.raises(RuntimeError, match="a packed layer has no gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (3, 96)


@pytest.mark.parametrize("rows", ROWS)
def test_weight_only_int8_does_not_round_activations(rows):
    layer = Int8Linear.from_float(plain().weight)
    x = inputs(rows)
    output = make(WeightOnlyInt8Linear, layer)(x)
    assert distance(output, exact(x, layer.dequantized())) < 3 * BF16
    assert torch.equal(WeightOnlyInt8Linear(layer).unpacked(), layer.dequantized())


def test_weight_only_int8_supports_only_widths_that_divide_by_32():
    assert WeightOnlyInt8Linear.supports(Int8Linear.from_float(torch.ones(5, 32)))
    assert not WeightOnlyInt8Linear.supports(Int8Linear.from_float(torch.ones(5, 44)))


@pytest.mark.parametrize("columns", [8, 44, 172])
@pytest.mark.parametrize("kernel", KERNELS)
def test_odd_widths_are_multiplied_correctly_or_not_supported(kernel, columns):
    for layer in (
        plain(rows=7, columns=columns),
        Int8Linear.from_float(plain(columns=columns).weight),
    ):
        if kernel.supports(layer):
            weight = layer.weight if type(layer) is nn.Linear else layer.dequantized()
            x = inputs(3, columns)
            assert distance(kernel(layer)(x), exact(x, weight)) < 0.05


@pytest.mark.parametrize("rows", ROWS)
def test_int4_on_a_cpu_is_the_plain_product(rows):
    layer = Int4Linear.from_float(plain().weight)
    x = inputs(rows)
    output = make(CPUInt4Linear, layer)(x)
    assert output.shape == (rows, 96)
    assert distance(output, exact(x, layer.dequantized())) < 3 * BF16


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_axes_of_its_input(kernel):
    layers = [
        plain(),
        plain(torch.float32),
        Int8Linear.from_float(plain().weight),
        Int4Linear.from_float(plain().weight),
    ]
    layer = next((layer for layer in layers if kernel.supports(layer)), None)
    if layer is None:
        pytest.skip("not on this machine")
    x = inputs(6, dtype=torch.float32 if layer is layers[1] else torch.bfloat16)
    packed = kernel(layer)
    torch.testing.assert_close(packed(x.view(2, 3, 64)), packed(x).view(2, 3, 96), rtol=0, atol=0)
    assert kernel.title in repr(packed)
    assert packed.nbytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


def test_an_inexact_kernel_is_not_supported(monkeypatch):
    """Simulates a processor whose 16-bit sums of pairs saturate."""

    class Saturating(RowInt8Linear):
        def product(self, integers):
            return (integers @ torch.full((integers.shape[-1], 64), 127.0)).clamp(max=2.0**21)

    assert not Saturating.is_exact()
    monkeypatch.setattr(OneDNNInt8Linear, "encode", Saturating.encode)
    monkeypatch.setattr(OneDNNInt8Linear, "product", Saturating.product)
    assert not OneDNNInt8Linear.supports(Int8Linear.from_float(plain().weight))


def test_kernels_of_missing_libraries_are_not_supported(monkeypatch):
    for module in (packed_linear, packed_int):
        monkeypatch.setattr(module, "has_onednn", lambda layer: False)
        monkeypatch.setattr(module, "has_fbgemm", lambda layer: False)
    assert [kernel for kernel in KERNELS if kernel.supports(plain())] == [TiledLinear]
    quantized = Int8Linear.from_float(plain().weight)
    assert [kernel for kernel in KERNELS if kernel.supports(quantized)] == [WeightOnlyInt8Linear]
