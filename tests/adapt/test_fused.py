"""Several layers as one product: the same rows, one multiplication."""

import threading

import pytest
import torch
from torch import nn

from llama32.adapt.fused import Part, Product, parts, siblings
from llama32.adapt.packed import TiledLinear
from llama32.adapt.quantized import Int4Linear, Int8Linear, joined


def layers(sizes: tuple[int, ...] = (5, 3, 4)) -> list[nn.Linear]:
    return [nn.Linear(64, size, bias=False).bfloat16() for size in sizes]


def fused(some: list[nn.Linear]) -> list[Part]:
    whole = joined(some)
    assert isinstance(whole, nn.Linear)
    return parts(TiledLinear(whole), [len(layer.weight) for layer in some])


def test_siblings_are_those_that_are_given_the_same_input():
    assert siblings("layers.3.attn.k_proj") == [f"layers.3.attn.{x}_proj" for x in "qkv"]
    assert siblings("layers.0.mlp.up_proj") == ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]
    assert siblings("layers.0.mlp.down_proj") == siblings("lm_head") == []


def test_each_gets_its_own_rows_of_one_product(monkeypatch):
    some = layers()
    x = torch.randn(2, 7, 64).bfloat16()
    calls = []
    multiply = TiledLinear.multiply
    monkeypatch.setattr(
        TiledLinear, "multiply", lambda self, x: calls.append(x) or multiply(self, x)
    )
    with torch.no_grad():
        found = [part(x) for part in fused(some)]
        wanted = [TiledLinear(layer)(x) for layer in some]
    assert [part.shape for part in found] == [(2, 7, 5), (2, 7, 3), (2, 7, 4)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1 + 3
    for part, layer in zip(fused(some), some, strict=True):
        assert torch.equal(part.unpacked(), layer.weight)


def test_another_input_is_another_product_also_if_it_is_equal():
    first, second, third = fused(layers())
    x, y = torch.ones(1, 64).bfloat16(), torch.zeros(1, 64).bfloat16()
    with torch.no_grad():
        assert first(x).any()
        assert not second(y).any()
        assert third(x).any()
        assert torch.equal(second(x), second(x.clone()))


def test_nothing_is_kept_when_each_has_had_its_rows():
    some = fused(layers())
    with torch.no_grad():
        for part in some:
            assert part.product._last is not None or part is some[0]
            part(torch.ones(1, 64).bfloat16() if part is some[0] else some[0].product._last[0])
    assert some[0].product._last is None


@pytest.mark.parametrize("form", [Int8Linear, Int4Linear])
def test_quantized_layers_are_joined_row_by_row(form):
    some = [form.of(layer.weight) for layer in layers((8, 4))]
    whole = joined(some)
    assert type(whole) is form
    wanted = torch.cat([layer.dequantized() for layer in some])
    assert torch.equal(whole.dequantized(), wanted)


def test_threads_with_inputs_of_their_own_never_get_each_other_s_rows():
    some = fused(layers())
    failures = []

    def go(value: float) -> None:
        x = torch.full((1, 64), value).bfloat16()
        with torch.no_grad():
            wanted = [part(x.clone()) for part in some]
            for _ in range(300):
                failures.extend(
                    not torch.equal(part(x), its) for part, its in zip(some, wanted, strict=True)
                )

    threads = [threading.Thread(target=go, args=(float(i),)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 4 * 300 * 3
    assert not any(failures)


def test_a_product_counts_its_weight_once():
    product = fused(layers())[0].product
    assert isinstance(product, Product)
    whole = nn.ModuleList(fused(layers()))
    assert sum(isinstance(part, TiledLinear) for part in whole.modules()) == 1
