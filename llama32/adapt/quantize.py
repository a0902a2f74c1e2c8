"""A model in fewer bits: which layers get which form."""

from dataclasses import replace

import torch
from torch import nn

from llama32.adapt.quantized import (
    GROUP,
    Float8Linear,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    joined,
)
from llama32.adapt.tied import QuantizedEmbedding, is_tied, linear_layers
from llama32.model import Llama

SCHEMES: dict[str, type[QuantizedLinear]] = {
    "int8": Int8Linear,
    "int4": Int4Linear,
    "fp8": Float8Linear,
}
PIECE = 256  # rows that are turned at a time: in fp32, too, they stay in a processor's cache


def quantize(model: Llama, scheme: str) -> Llama:
    """Keep the weights of all linear layers in fewer bits: "int8", "int4", or "fp8" for GPUs that
    compute with it. Returns the model.

    Norms stay as they are. The head, and an embedding that is tied to it, get int8 in every
    scheme: all logits come from them. So do layers whose rows the groups of int4 do not fill.
    The layers are in their plain form, to be looked at, saved and moved; `optimize(model)` makes
    them fast. How much either costs in accuracy is in `benchmarks/results/quantization.md`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: there is no scheme {scheme!r}, only {', '.join(SCHEMES)}")
    for name in linear_layers(model):
        quantize_layer(model, name, scheme)
    return model


@torch.no_grad()
def quantize_layer(model: Llama, name: str, scheme: str) -> None:
    """The same for one layer; one that is quantized already stays as it is."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        return
    needs_int8 = name == "lm_head" or (scheme == "int4" and layer.in_features % GROUP)
    form = Int8Linear if needs_int8 else SCHEMES[scheme]
    quantized = joined([form.of(piece) for piece in layer.weight.split(PIECE)])
    assert isinstance(quantized, QuantizedLinear)
    tied = name == "lm_head" and is_tied(model)
    model.set_submodule(name, quantized)
    model.config = replace(model.config, quantization=scheme)
    if tied:
        model.set_submodule("embed", QuantizedEmbedding(quantized, model.norm.weight.dtype))
