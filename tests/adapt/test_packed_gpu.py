"""What the forms for a GPU compute, as far as a CPU can tell. On a GPU: tests/gpu/."""

import pytest
import torch
from torch import nn

from llama32.adapt.optimize import FORMS
from llama32.adapt.packed_gpu import (
    CUDAFloat8Linear,
    CUDAInt4Linear,
    CUDAInt8Linear,
    can,
)
from llama32.adapt.packed_int import OneDNNInt8Linear
from llama32.adapt.quantized import Float8Linear, Int4Linear, Int8Linear

ON_GPU = CUDAInt8Linear, CUDAInt4Linear, CUDAFloat8Linear


def weight(rows: int = 48, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def inputs(rows: int) -> torch.Tensor:
    sizes = torch.logspace(-2, 2, max(rows, 1))[:rows, None]
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)) * sizes


@pytest.mark.parametrize("form", ON_GPU)
def test_on_a_cpu_there_are_none(form):
    for layer in (nn.Linear(64, 64), *(x.of(weight()) for x in (Int8Linear, Int4Linear))):
        assert not form.fits(layer)
    assert form in FORMS


def test_a_chip_must_be_new_enough_and_sizes_must_be_whole(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    gpu = torch.device("cuda")
    assert can(gpu, (64, 32), (8, 0), 8)
    assert not can(torch.device("cpu"), (64, 32), (8, 0), 8)
    assert not can(gpu, (64, 32), (8, 9), 8)
    assert not can(gpu, (60, 32), (8, 0), 8)
    assert not can(gpu, (64, 36), (8, 0), 8)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 8, 40])
def test_integers_are_multiplied_as_on_a_cpu(rows, fine):
    layer = Int8Linear.of(weight())
    if not OneDNNInt8Linear.fits(layer):
        pytest.skip("not on this machine")
    x = inputs(rows).view(1, rows, 64)
    found = CUDAInt8Linear(layer, fine=fine)(x)
    torch.testing.assert_close(found, OneDNNInt8Linear(layer, fine=fine)(x))
    assert torch.equal(CUDAInt8Linear(layer).unpacked(), layer.dequantized())


def test_small_floats_are_multiplied_by_small_floats(monkeypatch):
    """By a product that does what `_scaled_mm` says it does."""

    def product(a, b, *, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert not b.is_contiguous()  # columns, as the GPU wants it
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", product)
    layer, x = Float8Linear.of(weight()), inputs(5).view(1, 5, 64)
    found = CUDAFloat8Linear(layer)(x)
    rounded = Float8Linear.of(x[0]).dequantized()
    wanted = (rounded @ layer.dequantized().mT).bfloat16().float()
    torch.testing.assert_close(found[0], wanted)
    assert found.dtype == torch.float32
    assert torch.equal(CUDAFloat8Linear(layer).unpacked(), layer.dequantized())


def test_four_bits_are_handed_over_with_the_earlier_one_high(monkeypatch):
    """As tinygemm reads a byte; and as many tiles as divide a row."""
    packed = []

    def pack(weight, tiles):
        packed.append((weight, tiles))
        return weight

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack)
    for columns, tiles in [(64, 4), (128, 8), (96, 2), (32, 2)]:
        layer = Int4Linear.of(weight(8, columns))
        CUDAInt4Linear(layer)
        given, its_tiles = packed.pop()
        assert its_tiles == tiles
        assert given.dtype == torch.uint8
        pairs = torch.stack([given >> 4, given & 15], -1).flatten(-2)
        assert torch.equal(pairs, layer.integers)
