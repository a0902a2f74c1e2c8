"""Fused projections: the same outputs from a single product."""

import threading

import pytest
import torch
from torch import nn

from llama32.kernels.fused_projections import (
    FusedProjection,
    ProjectionSlice,
    siblings,
    split_projection,
)
from llama32.kernels.packed_linear import TiledLinear
from llama32.quantization.quantized_linear import Int4Linear, Int8Linear, concat_rows


def layers(sizes: tuple[int, ...] = (5, 3, 4)) -> list[nn.Linear]:
    return [nn.Linear(64, size, bias=False).bfloat16() for size in sizes]


def fused(parts: list[nn.Linear]) -> list[ProjectionSlice]:
    whole = concat_rows(parts)
    assert isinstance(whole, nn.Linear)
    return split_projection(TiledLinear(whole), [len(layer.weight) for layer in parts])


def test_siblings_are_the_layers_with_the_same_input():
    assert siblings("layers.3.attn.k_proj") == [f"layers.3.attn.{x}_proj" for x in "qkv"]
    assert siblings("layers.0.mlp.up_proj") == ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]
    assert siblings("layers.0.mlp.down_proj") == siblings("lm_head") == []


def test_each_layer_returns_its_slice_of_one_product(monkeypatch):
    separate = layers()
    x = torch.randn(2, 7, 64).bfloat16()
    calls = []
    multiply = TiledLinear.multiply
    monkeypatch.setattr(
        TiledLinear, "multiply", lambda self, x: calls.append(x) or multiply(self, x)
    )
    with torch.no_grad():
        outputs = [part(x) for part in fused(separate)]
        expected = [TiledLinear(layer)(x) for layer in separate]
    assert [output.shape for output in outputs] == [(2, 7, 5), (2, 7, 3), (2, 7, 4)]
    for output, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, plain)
    assert len(calls) == 1 + 3
    for part, layer in zip(fused(separate), separate, strict=True):
        assert torch.equal(part.unpacked(), layer.weight)


def test_every_new_input_tensor_is_multiplied_even_if_equal():
    first, second, third = fused(layers())
    x, y = torch.ones(1, 64).bfloat16(), torch.zeros(1, 64).bfloat16()
    with torch.no_grad():
        assert first(x).any()
        assert not second(y).any()
        assert third(x).any()
        assert torch.equal(second(x), second(x.clone()))


def test_the_product_is_released_after_the_last_layer_has_read_it():
    parts = fused(layers())
    product = parts[0].product
    with torch.no_grad():
        for part in parts:
            assert product._last is not None or part is parts[0]
            part(torch.ones(1, 64).bfloat16() if part is parts[0] else product._last[0])
    assert product._last is None


@pytest.mark.parametrize("layer_type", [Int8Linear, Int4Linear])
def test_quantized_layers_are_concatenated_by_rows(layer_type):
    parts = [layer_type.from_float(layer.weight) for layer in layers((8, 4))]
    whole = concat_rows(parts)
    assert type(whole) is layer_type
    expected = torch.cat([layer.dequantized() for layer in parts])
    assert torch.equal(whole.dequantized(), expected)


def test_threads_never_get_the_product_of_another_thread():
    parts = fused(layers())
    failures = []

    def run(value: float) -> None:
        x = torch.full((1, 64), value).bfloat16()
        with torch.no_grad():
            expected = [part(x.clone()) for part in parts]
            for _ in range(300):
                failures.extend(
                    not torch.equal(part(x), output)
                    for part, output in zip(parts, expected, strict=True)
                )

    threads = [threading.Thread(target=run, args=(float(i),)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 4 * 300 * 3
    assert not any(failures)


def test_a_fused_projection_is_one_module_of_the_model():
    product = fused(layers())[0].product
    assert isinstance(product, FusedProjection)
    whole = nn.ModuleList(fused(layers()))
    assert sum(isinstance(part, TiledLinear) for part in whole.modules()) == 1
