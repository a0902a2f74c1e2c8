"""Quantized linear layers: rounding errors, and otherwise unchanged behavior."""

import pytest
import torch
from torch import nn

from llama32.quantization.quantized_linear import GROUP_SIZE, Float8Linear, Int4Linear, Int8Linear


def random_weight(rows: int = 24, columns: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-3, 1, rows).unsqueeze(-1)  # very different from row to row
    return torch.randn(rows, columns, generator=generator) * magnitudes


def test_int8_is_within_half_a_step_of_every_weight():
    weight = random_weight()
    layer = Int8Linear.from_float(weight)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((layer.dequantized() - weight).abs() <= step / 2 * 1.0001).all()
    assert layer.weight.dtype == torch.int8
    assert layer.weight.abs().amax(-1).eq(127).all()  # every row uses the whole range


def test_fp8_keeps_four_significant_bits_of_every_weight():
    weight = random_weight()
    layer = Float8Linear.from_float(weight)
    # 448 stands for the largest weight of a row; below 2^-6 the steps are 2^-9.
    step = weight.abs().amax(-1, keepdim=True) / 448 * 2**-9
    error = (layer.dequantized() - weight).abs()
    assert (error <= (weight.abs() / 16).maximum(step / 2) * 1.0001).all()
    assert layer.weight.float().abs().amax(-1).eq(448).all()


def test_int4_is_within_a_step_of_every_weight():
    weight = random_weight()
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15  # half a step from rounding, the rest from scales in bf16
    stored = Int4Linear.from_float(weight).dequantized().unflatten(-1, (-1, GROUP_SIZE))
    assert ((stored - groups).abs() <= step).all()


def test_int4_rounds_to_the_nearest_of_sixteen_values():
    layer = Int4Linear.from_float(random_weight())
    scale, zero = layer.scale.float().unsqueeze(-1), layer.zero.float().unsqueeze(-1)
    values = (torch.arange(16) - 8) * scale.unsqueeze(-1) + zero.unsqueeze(-1)
    groups = random_weight().unflatten(-1, (-1, GROUP_SIZE))
    nearest = (groups.unsqueeze(-1) - values).abs().amin(-1)
    stored = layer.dequantized().unflatten(-1, (-1, GROUP_SIZE))
    torch.testing.assert_close((stored - groups).abs(), nearest)


def test_the_earlier_of_two_int4_integers_is_in_the_low_bits():
    layer = Int4Linear(
        torch.tensor([[0xA3] * 16], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1)
    )
    assert layer.integers.tolist() == [[3, 10] * 16]
    assert layer.dequantized().tolist() == [[-5.0, 2.0] * 16]


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Float8Linear])
def test_rows_of_zeros_stay_zeros(kind):
    weight = random_weight()
    weight[3] = 0
    assert kind.from_float(weight).dequantized()[3].eq(0).all()


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Float8Linear])
def test_a_layer_multiplies_with_the_dequantized_weight(kind):
    layer = kind.from_float(random_weight())
    x = torch.randn(2, 3, 64)
    assert layer.in_features == 64
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantized()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not [*layer.parameters()]


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Float8Linear])
def test_slice_rows_returns_the_rows_of_the_whole_layer(kind):
    layer = kind.from_float(random_weight())
    assert torch.equal(layer.slice_rows(slice(4, 9)).dequantized(), layer.dequantized()[4:9])
    index = torch.tensor([7, 7, 0])
    assert torch.equal(layer.slice_rows(index).dequantized(), layer.dequantized()[index])


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Float8Linear])
def test_a_cast_does_not_cast_scales(kind):
    layer = kind.from_float(random_weight())
    before = layer.dequantized()
    layer.to(torch.float16)
    assert torch.equal(layer.dequantized(), before)
    layer.to("meta")
    assert {x.device.type for x in layer.buffers()} == {"meta"}


def test_int4_refuses_widths_that_are_no_multiple_of_the_group():
    with pytest.raises(ValueError, match="rows of 40 weights, not a multiple of 32"):
        Int4Linear.from_float(torch.ones(2, 40))
