"""Each packed form computes what its plain form does, within its rounding, and gives it back."""

from typing import Any

import pytest
import torch
from torch import nn

from llama32.adapt import packed, packed_int
from llama32.adapt.optimize import FORMS
from llama32.adapt.packed import FBGEMMLinear, OneDNNLinear, TiledLinear
from llama32.adapt.packed_int import (
    CPUInt4Linear,
    FBGEMMInt7Linear,
    FBGEMMInt8Linear,
    OneDNNInt8Linear,
    RowInt8Linear,
    WeightOnlyInt8Linear,
)
from llama32.adapt.quantized import Int4Linear, Int8Linear

BF16 = 2.0**-8  # of a sum that is rounded to bf16
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


def make(form: Any, layer: Any) -> Any:
    if not form.fits(layer):
        pytest.skip("not on this machine")
    return form(layer)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, as a part of its row's size."""
    error = (found.double() - wanted.double()).norm(dim=-1)
    return (error / wanted.double().norm(dim=-1)).max().item() if len(found) else 0.0


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().mT


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", [OneDNNLinear, FBGEMMLinear, TiledLinear])
def test_16_bit_products_are_as_good_as_plain_ones(form, rows):
    layer = plain()
    x = inputs(rows)
    wanted = exact(x, layer.weight)
    found = make(form, layer)(x)
    assert found.shape == (rows, 96)
    assert found.dtype == x.dtype
    assert distance(found, wanted) <= max(2 * distance(layer(x), wanted), 1e-6)


@pytest.mark.parametrize("form", [OneDNNLinear, FBGEMMLinear, TiledLinear])
def test_16_bit_weights_come_back_whole(form):
    layer = plain()
    assert torch.equal(make(form, layer).unpacked().to(layer.weight.dtype), layer.weight)


def test_fp32_weights_go_into_blocks_too():
    layer = plain(torch.float32)
    x = inputs(5, dtype=torch.float32)
    assert distance(make(OneDNNLinear, layer)(x), exact(x, layer.weight)) < 1e-6


def test_a_weight_beyond_fp16_is_refused_rather_than_cut():
    layer = plain()
    make(FBGEMMLinear, layer)
    with torch.no_grad():
        layer.weight[3, 5] = 70_000
    with pytest.raises(ValueError, match="beyond what fp16 can hold"):
        FBGEMMLinear(layer)


def rounded(x: torch.Tensor, top: int) -> torch.Tensor:
    """Activations as an int8 product sees them: each row in steps of its own."""
    size = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
    return (x.float() / size).round().double() * size


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", [OneDNNInt8Linear, FBGEMMInt8Linear, FBGEMMInt7Linear])
def test_an_int8_product_is_the_plain_one_of_rounded_activations(form, rows):
    layer = Int8Linear.of(plain().weight)
    x = inputs(rows)
    fast = make(form, layer)
    wanted = exact(rounded(x, fast.top), layer.dequantized())
    assert distance(fast(x), wanted) < 2 * BF16
    assert distance(fast(x.float()), wanted) < 1e-6
    assert torch.equal(fast.unpacked(), layer.dequantized())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", [OneDNNInt8Linear, FBGEMMInt8Linear, FBGEMMInt7Linear])
def test_a_fine_int8_product_rounds_what_was_rounded_off_as_well(form, rows):
    layer = Int8Linear.of(plain().weight)
    if not form.fits(layer):
        pytest.skip("not on this machine")
    fast, x = form(layer, fine=True), inputs(rows)
    assert distance(fast(x.float()), exact(x, layer.dequantized())) < 2 / fast.top**2


@pytest.mark.parametrize("form", [OneDNNInt8Linear, FBGEMMInt8Linear, FBGEMMInt7Linear])
def test_a_row_of_an_int8_product_has_the_same_bits_in_any_company(form):
    x = inputs(65)
    for layer in (
        make(form, Int8Linear.of(plain().weight)),
        form(Int8Linear.of(plain().weight), fine=True),
    ):
        whole = layer(x)
        for start, stop in [(0, 1), (64, 65), (3, 5), (8, 24), (1, 64)]:
            assert torch.equal(layer(x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("fine", [False, True])
def test_many_rows_are_rounded_in_pieces_to_the_same_bits(fine, monkeypatch):
    layer = Int8Linear.of(plain().weight)
    if not OneDNNInt8Linear.fits(layer):
        pytest.skip("not on this machine")
    fast, x = OneDNNInt8Linear(layer, fine=fine), inputs(65)
    whole = fast(x)
    monkeypatch.setattr(RowInt8Linear, "PIECE", 16)
    assert torch.equal(fast(x), whole)


def test_a_row_of_zeros_comes_out_as_zeros():
    layer = make(OneDNNInt8Linear, Int8Linear.of(plain().weight))
    assert layer(torch.zeros(2, 64)).eq(0).all()


def test_a_gradient_is_refused_rather_than_lost():
    layer = TiledLinear(plain())
    x = inputs(3).requires_grad_()
    with pytest.raises(RuntimeError, match="a packed layer has no gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (3, 96)


@pytest.mark.parametrize("rows", ROWS)
def test_weight_only_int8_leaves_the_activations_alone(rows):
    layer = Int8Linear.of(plain().weight)
    x = inputs(rows)
    found = make(WeightOnlyInt8Linear, layer)(x)
    assert distance(found, exact(x, layer.dequantized())) < 3 * BF16
    assert torch.equal(WeightOnlyInt8Linear(layer).unpacked(), layer.dequantized())


def test_weight_only_int8_leaves_rows_that_it_would_read_beyond_to_others():
    assert WeightOnlyInt8Linear.fits(Int8Linear.of(torch.ones(5, 32)))
    assert not WeightOnlyInt8Linear.fits(Int8Linear.of(torch.ones(5, 44)))


@pytest.mark.parametrize("columns", [8, 44, 172])
@pytest.mark.parametrize("form", FORMS)
def test_odd_widths_are_multiplied_rightly_or_not_at_all(form, columns):
    for layer in (plain(rows=7, columns=columns), Int8Linear.of(plain(columns=columns).weight)):
        if form.fits(layer):
            wide = layer.weight if type(layer) is nn.Linear else layer.dequantized()
            x = inputs(3, columns)
            assert distance(form(layer)(x), exact(x, wide)) < 0.05


@pytest.mark.parametrize("rows", ROWS)
def test_int4_on_a_cpu_is_the_plain_product(rows):
    layer = Int4Linear.of(plain().weight)
    x = inputs(rows)
    found = make(CPUInt4Linear, layer)(x)
    assert found.shape == (rows, 96)
    assert distance(found, exact(x, layer.dequantized())) < 3 * BF16


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_the_axes_of_its_input(form):
    layers = [
        plain(),
        plain(torch.float32),
        Int8Linear.of(plain().weight),
        Int4Linear.of(plain().weight),
    ]
    layer = next((layer for layer in layers if form.fits(layer)), None)
    if layer is None:
        pytest.skip("not on this machine")
    x = inputs(6, dtype=torch.float32 if layer is layers[1] else torch.bfloat16)
    fast = form(layer)
    torch.testing.assert_close(fast(x.view(2, 3, 64)), fast(x).view(2, 3, 96), rtol=0, atol=0)
    assert form.title in repr(fast)
    assert fast.nbytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


def test_an_inexact_product_is_not_taken(monkeypatch):
    """As on processors that add pairs of products in 16 bits."""

    class Saturating(RowInt8Linear):
        def product(self, integers):
            return (integers @ torch.full((integers.shape[-1], 64), 127.0)).clamp(max=2.0**21)

    assert not Saturating.is_exact()
    monkeypatch.setattr(OneDNNInt8Linear, "encode", Saturating.encode)
    monkeypatch.setattr(OneDNNInt8Linear, "product", Saturating.product)
    assert not OneDNNInt8Linear.fits(Int8Linear.of(plain().weight))


def test_what_a_library_lacks_is_left_out(monkeypatch):
    for module in (packed, packed_int):
        monkeypatch.setattr(module, "on_x86", lambda leaf: False)
        monkeypatch.setattr(module, "has_fbgemm", lambda leaf: False)
    fitting = [form for form in FORMS if form.fits(plain())]
    assert fitting == [TiledLinear]
    assert [form for form in FORMS if form.fits(Int8Linear.of(plain().weight))] == [
        WeightOnlyInt8Linear
    ]
