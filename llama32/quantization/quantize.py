"""Quantize a model: choose a quantized layer for every linear layer."""

from dataclasses import replace

import torch
from torch import nn

from llama32.model import Llama
from llama32.quantization.quantized_linear import (
    GROUP_SIZE,
    Float8Linear,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    concat_rows,
)
from llama32.quantization.tied_embedding import QuantizedEmbedding, is_tied, linear_layer_names

SCHEMES: dict[str, type[QuantizedLinear]] = {
    "int8": Int8Linear,
    "int4": Int4Linear,
    "fp8": Float8Linear,
}
CHUNK_ROWS = 256  # rows quantized at a time: their fp32 copy fits into a processor's cache


def quantize(model: Llama, scheme: str) -> Llama:
    """Quantize all linear layers in place and return the model.

    Schemes are "int8", "int4", and "fp8" for GPUs that compute in fp8; ValueError for any other.
    Norms do not change. `lm_head` and a tied embedding get int8 in every scheme, because all logits
    depend on the head. int8 also replaces int4 in layers of a width that is no multiple of the
    group size. The new layers are plain, to inspect, save and move; `optimize(model)` makes the
    layers fast. `benchmarks/results/quantization.md` lists the loss of accuracy of both.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: there is no scheme {scheme!r}, only {', '.join(SCHEMES)}")
    for name in linear_layer_names(model):
        quantize_layer(model, name, scheme)
    return model


@torch.no_grad()
def quantize_layer(model: Llama, name: str, scheme: str) -> None:
    """Quantize one layer in place, unless already quantized."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        return
    needs_int8 = name == "lm_head" or (scheme == "int4" and layer.in_features % GROUP_SIZE)
    kind = Int8Linear if needs_int8 else SCHEMES[scheme]
    quantized = concat_rows([kind.from_float(chunk) for chunk in layer.weight.split(CHUNK_ROWS)])
    assert isinstance(quantized, QuantizedLinear)
    tied = name == "lm_head" and is_tied(model)
    model.set_submodule(name, quantized)
    model.config = replace(model.config, quantization=scheme)
    if tied:
        model.set_submodule("embed", QuantizedEmbedding(quantized, model.norm.weight.dtype))
