"""LoRA: a change of a few linear layers that is small enough to train, keep and hand around.

Beside a weight W stand two thin matrices, so that the layer gives Wx + scale * B(Ax). W stays as it
is, whatever form it has. B begins as zeros: a fresh adapter changes nothing. (Hu et al. 2021)

    lora = add_lora(model, targets=("q_proj", "v_proj"), rank=8)   # trains lora.parameters()
    save_lora(lora, "poet")                                        # as PEFT reads it
    with using_lora(model, load_lora("poet")): model(tokens)       # in this call only

An adapter is a value and belongs to no model. Several can be in one model at once: they add up.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llama32.adapt.quantized import linear
from llama32.adapt.tied import linear_layers
from llama32.model import Llama

# Of a layer with an adapter in its weight: what stood there before, to be exact when that comes
# back. In a list, so it is no part of the model, and neither saved nor moved.
BEFORE = "before_merging"
LINEARS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


class Pair(nn.Module):
    """The two thin matrices of one layer, in fp32: their steps in training are small."""

    def __init__(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"], scale: float):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return self.scale * F.linear(F.linear(x.type_as(self.a), self.a), self.b)

    @property
    def change(self) -> Float[Tensor, "out in"]:
        """What it adds to the weight."""
        return self.scale * (self.b @ self.a)


class LoRA(nn.Module):
    """An adapter: for the names of some layers ("layers.0.attn.q_proj") a pair each."""

    def __init__(self, pairs: Mapping[str, Pair], dropout: float = 0.0) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict({name.replace(".", "/"): pair for name, pair in pairs.items()})
        self.dropout = dropout  # of the inputs, in training

    def items(self) -> Iterator[tuple[str, Pair]]:
        """Each layer's name and pair."""
        for name, pair in self.pairs.items():
            assert isinstance(pair, Pair)
            yield name.replace("/", "."), pair


class LoRALinear(nn.Module):
    """A layer and, beside it, its part of an adapter."""

    def __init__(self, base: nn.Module, pair: Pair, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.pair = pair
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = self.base(x)
        return y + self.pair(F.dropout(x, self.dropout, self.training)).type_as(y)


def add_lora(
    model: Llama,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> LoRA:
    """Put a fresh adapter into a model, and freeze all else. Train its `parameters()`.

    `targets` are the last parts of layers' names; `LINEARS` are all within the layers. The change
    is scaled by `alpha / rank`; `alpha` is twice the rank unless given.
    """
    sizes = {name: its for name, its in linears(model).items() if name.split(".")[-1] in targets}
    missing = {*targets} - {name.split(".")[-1] for name in sizes}
    if missing or not sizes:
        raise ValueError(f"add_lora: no linear layer is called {', '.join(sorted(missing))}")
    if rank < 1:
        raise ValueError(f"add_lora: rank is {rank}, allowed: 1 or more")
    draw = torch.Generator().manual_seed(seed)
    scale = (2 * rank if alpha is None else alpha) / rank
    pairs = {}
    for name, (outputs, inputs) in sizes.items():
        bound = 1 / math.sqrt(inputs)  # as nn.Linear begins, and PEFT's A
        a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=draw)
        pairs[name] = Pair(a, torch.zeros(outputs, rank), scale)
    lora = LoRA(pairs, dropout).to(model.norm.weight.device)
    model.requires_grad_(False)
    put_lora(model, lora)
    return lora


def put_lora(model: Llama, lora: LoRA) -> None:
    """Let a model go through an adapter. ValueError where it does not fit."""
    check_fit(lora, linears(model))
    for name, pair in lora.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), pair, lora.dropout))


def remove_lora(model: Llama, lora: LoRA) -> None:
    """Let it go on without an adapter: exactly as before."""
    for name, pair in lora.items():
        model.set_submodule(name, without(model.get_submodule(name), pair, name))


@contextmanager
def using_lora(model: Llama, lora: LoRA) -> Iterator[None]:
    """With an adapter within the block. To choose among several, one block each."""
    put_lora(model, lora)
    try:
        yield
    finally:
        remove_lora(model, lora)


def merge_lora(model: Llama, lora: LoRA) -> None:
    """Put an adapter into the weights themselves: it costs nothing then, and `save` writes a
    checkpoint for all. If it is in the model as an adapter, it is so no more."""
    layers = {}
    for name, pair in lora.items():
        layer = model.get_submodule(name)
        base = without(layer, pair, name) if holds(layer, pair) else layer
        layers[name] = merged(base, pair, name)
        setattr(layers[name], BEFORE, [layer])
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def unmerge_lora(model: Llama, lora: LoRA) -> None:
    """Take back what `merge_lora` did, to the last bit."""
    for name, _ in lora.items():
        layer = model.get_submodule(name)
        if not hasattr(layer, BEFORE):
            raise ValueError(f"{name}: no adapter was merged into it")
        model.set_submodule(name, getattr(layer, BEFORE)[0])


def merged(layer: nn.Module, pair: Pair, name: str) -> nn.Linear:
    """A plain layer with the change in its weight."""
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is not in floats: merge into the model it was made of")
    weight = layer.weight.detach()
    change = pair.change.detach().to(weight.device, torch.float32)
    return linear((weight.float() + change).type_as(weight))


def check_fit(lora: LoRA, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where a pair has no layer of its size."""
    for name, pair in lora.items():
        wanted, there = (len(pair.b), pair.a.shape[1]), sizes.get(name, "nothing")
        if there != wanted:
            raise ValueError(f"the adapter does not fit: {name} is {wanted} in it, {there} here")


def linears(model: Llama) -> dict[str, tuple[int, int]]:
    """The layers that an adapter can stand beside (another may do so already), each with its
    outputs and inputs. Packed ones are none: add adapters before `optimize`, or leave it."""
    return {
        name.replace(".base", ""): size(model.get_submodule(name)) for name in linear_layers(model)
    }


def size(layer: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    return len(layer.weight), layer.in_features


def holds(layer: nn.Module, pair: Pair) -> bool:
    """Whether a pair is in a layer, under others perhaps."""
    return isinstance(layer, LoRALinear) and (layer.pair is pair or holds(layer.base, pair))


def without(layer: nn.Module, pair: Pair, name: str) -> nn.Module:
    """The layer less a pair; others stay."""
    if not isinstance(layer, LoRALinear):
        raise ValueError(f"{name}: the adapter is not in this model")
    if layer.pair is pair:
        return layer.base
    return LoRALinear(without(layer.base, pair, name), layer.pair, layer.dropout)
