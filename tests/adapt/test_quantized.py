"""Weights as integers: what they stand for, and that nothing else about a layer changes."""

import pytest
import torch
from torch import nn

from llama32.adapt.quantized import GROUP, Float8Linear, Int4Linear, Int8Linear


def weight_of(rows: int = 24, columns: int = 64, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows).unsqueeze(-1)  # rows of very different sizes
    return torch.randn(rows, columns, generator=draw) * sizes


def test_int8_is_within_half_a_step_of_every_weight():
    weight = weight_of()
    layer = Int8Linear.of(weight)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((layer.dequantized() - weight).abs() <= step / 2 * 1.0001).all()
    assert layer.weight.dtype == torch.int8
    assert layer.weight.abs().amax(-1).eq(127).all()  # no row leaves a part of the range unused


def test_fp8_keeps_four_significant_bits_of_every_weight():
    weight = weight_of()
    layer = Float8Linear.of(weight)
    # The smallest steps are for what is below 2^-6, of 448 that stand for the largest of a row.
    step = weight.abs().amax(-1, keepdim=True) / 448 * 2**-9
    error = (layer.dequantized() - weight).abs()
    assert (error <= (weight.abs() / 16).maximum(step / 2) * 1.0001).all()
    assert layer.weight.float().abs().amax(-1).eq(448).all()


def test_int4_is_within_a_step_of_every_weight():
    weight = weight_of()
    groups = weight.unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15  # half of it from rounding, the rest from scales in bf16
    found = Int4Linear.of(weight).dequantized().unflatten(-1, (-1, GROUP))
    assert ((found - groups).abs() <= step).all()


def test_int4_is_the_nearest_of_its_sixteen_values():
    layer = Int4Linear.of(weight_of())
    scale, zero = layer.scale.float().unsqueeze(-1), layer.zero.float().unsqueeze(-1)
    values = (torch.arange(16) - 8) * scale.unsqueeze(-1) + zero.unsqueeze(-1)
    groups = weight_of().unflatten(-1, (-1, GROUP))
    nearest = (groups.unsqueeze(-1) - values).abs().amin(-1)
    found = layer.dequantized().unflatten(-1, (-1, GROUP))
    torch.testing.assert_close((found - groups).abs(), nearest)


def test_two_integers_of_four_bits_lie_in_a_byte_the_earlier_one_low():
    layer = Int4Linear(
        torch.tensor([[0xA3] * 16], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1)
    )
    assert layer.integers.tolist() == [[3, 10] * 16]
    assert layer.dequantized().tolist() == [[-5.0, 2.0] * 16]


@pytest.mark.parametrize("form", [Int8Linear, Int4Linear, Float8Linear])
def test_rows_of_zeros_stay_zeros(form):
    weight = weight_of()
    weight[3] = 0
    assert form.of(weight).dequantized()[3].eq(0).all()


@pytest.mark.parametrize("form", [Int8Linear, Int4Linear, Float8Linear])
def test_the_plain_form_multiplies_by_what_its_integers_stand_for(form):
    layer = form.of(weight_of())
    x = torch.randn(2, 3, 64)
    assert layer.in_features == 64
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantized()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not [*layer.parameters()]


@pytest.mark.parametrize("form", [Int8Linear, Int4Linear, Float8Linear])
def test_some_rows_are_those_of_the_whole(form):
    layer = form.of(weight_of())
    assert torch.equal(layer.rows(slice(4, 9)).dequantized(), layer.dequantized()[4:9])
    chosen = torch.tensor([7, 7, 0])
    assert torch.equal(layer.rows(chosen).dequantized(), layer.dequantized()[chosen])


@pytest.mark.parametrize("form", [Int8Linear, Int4Linear, Float8Linear])
def test_a_cast_leaves_the_scales_alone(form):
    layer = form.of(weight_of())
    before = layer.dequantized()
    layer.to(torch.float16)
    assert torch.equal(layer.dequantized(), before)
    layer.to("meta")
    assert {x.device.type for x in layer.buffers()} == {"meta"}


def test_int4_refuses_rows_that_groups_do_not_fill():
    with pytest.raises(ValueError, match="rows of 40 weights, not a multiple of 32"):
        Int4Linear.of(torch.ones(2, 40))
