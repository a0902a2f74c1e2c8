"""LoRA: low-rank updates of linear layers, small enough to train, store and share.

Two thin matrices beside a weight W make the layer compute Wx + scale * B(Ax). W stays unchanged,
quantized or not. B starts as zeros: a fresh adapter changes nothing. (Hu et al. 2021)

    lora = add_lora(model, targets=("q_proj", "v_proj"), rank=8)   # train lora.parameters()
    save_lora(lora, "poet")                                        # in PEFT's format
    with using_lora(model, load_lora("poet")): model(tokens)       # attached during `with`

An adapter is separate from the model. Several adapters attached to one model add up.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llama32.model import Llama
from llama32.quantization.quantized_linear import linear_from_weight
from llama32.quantization.tied_embedding import linear_layer_names

# Attribute of a merged layer: the layer before the merge, to restore the exact bits. A list around
# the layer hides it from `nn.Module`: the layer is neither saved nor moved with the model.
MERGED_FROM = "before_merging"
ALL_LINEAR = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


class LoRAWeights(nn.Module):
    """The matrices A and B of one layer, in fp32 because training steps are small."""

    def __init__(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"], scale: float):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return self.scale * F.linear(F.linear(x.type_as(self.a), self.a), self.b)

    @property
    def delta(self) -> Float[Tensor, "out in"]:
        """The update of the weight: scale * B A."""
        return self.scale * (self.b @ self.a)


class LoRA(nn.Module):
    """An adapter: LoRA weights by layer name, such as "layers.0.attn.q_proj"."""

    def __init__(self, weights: Mapping[str, LoRAWeights], dropout: float = 0.0) -> None:
        super().__init__()
        # A ModuleDict allows no dots in its keys.
        self.weights = nn.ModuleDict(
            {name.replace(".", "/"): layer_weights for name, layer_weights in weights.items()}
        )
        self.dropout = dropout  # dropout probability of the inputs, in training only

    def items(self) -> Iterator[tuple[str, LoRAWeights]]:
        """Yield pairs of layer name and LoRA weights."""
        for name, weights in self.weights.items():
            assert isinstance(weights, LoRAWeights)
            yield name.replace("/", "."), weights


class LoRALinear(nn.Module):
    """A layer with the LoRA weights of one adapter attached."""

    def __init__(self, base: nn.Module, lora: LoRAWeights, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora = lora
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = self.base(x)
        return y + self.lora(F.dropout(x, self.dropout, self.training)).type_as(y)


def add_lora(
    model: Llama,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> LoRA:
    """Attach a fresh adapter to a model and freeze all other weights.

    Train the adapter's `parameters()`. `targets` are the last parts of layer names; `ALL_LINEAR`
    lists all linear layers within the transformer blocks. The update is scaled by `alpha / rank`,
    where `alpha` defaults to twice the rank. Raises ValueError for an unknown target or a rank
    below 1.
    """
    sizes = {
        name: size for name, size in linear_sizes(model).items() if name.split(".")[-1] in targets
    }
    missing = {*targets} - {name.split(".")[-1] for name in sizes}
    if missing or not sizes:
        known = sorted({name.split(".")[-1] for name in linear_sizes(model)})
        raise ValueError(
            f"add_lora: no linear layer is called {', '.join(sorted(missing)) or repr('')}, "
            f"allowed: {', '.join(known)}"
        )
    if rank < 1:
        raise ValueError(f"add_lora: rank is {rank}, allowed: 1 or more")
    generator = torch.Generator().manual_seed(seed)
    scale = (2 * rank if alpha is None else alpha) / rank
    weights = {}
    for name, (outputs, inputs) in sizes.items():
        bound = 1 / math.sqrt(inputs)  # the initialization of nn.Linear, and of A in PEFT
        a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        weights[name] = LoRAWeights(a, torch.zeros(outputs, rank), scale)
    lora = LoRA(weights, dropout).to(model.norm.weight.device)
    model.requires_grad_(False)
    attach_lora(model, lora)
    return lora


def attach_lora(model: Llama, lora: LoRA) -> None:
    """Attach an adapter to a model. Raises ValueError if the sizes do not fit."""
    check_fit(lora, linear_sizes(model))
    for name, weights in lora.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), weights, lora.dropout))


def remove_lora(model: Llama, lora: LoRA) -> None:
    """Detach an adapter: the model computes the same bits as before `attach_lora`."""
    for name, weights in lora.items():
        model.set_submodule(name, detach_layer(model.get_submodule(name), weights, name))


@contextmanager
def using_lora(model: Llama, lora: LoRA) -> Iterator[None]:
    """Attach an adapter during a `with` statement; nest the statements for several adapters."""
    attach_lora(model, lora)
    try:
        yield
    finally:
        remove_lora(model, lora)


def merge_lora(model: Llama, lora: LoRA) -> None:
    """Merge an adapter into the weights, and detach the adapter if attached.

    A merged adapter costs no extra time, and `save` writes an ordinary checkpoint.
    """
    merged = {}
    for name, weights in lora.items():
        layer = model.get_submodule(name)
        base = detach_layer(layer, weights, name) if is_attached(layer, weights) else layer
        merged[name] = merge_layer(base, weights, name)
        setattr(merged[name], MERGED_FROM, [layer])
    for name, layer in merged.items():
        model.set_submodule(name, layer)


def unmerge_lora(model: Llama, lora: LoRA) -> None:
    """Undo `merge_lora` bit for bit; an adapter attached before the merge is attached again."""
    for name, _ in lora.items():
        layer = model.get_submodule(name)
        if not hasattr(layer, MERGED_FROM):
            raise ValueError(f"{name}: no adapter was merged into this layer")
        model.set_submodule(name, getattr(layer, MERGED_FROM)[0])


def merge_layer(layer: nn.Module, weights: LoRAWeights, name: str) -> nn.Linear:
    """Return a plain linear layer with the LoRA weights added. Raises ValueError if quantized."""
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{name} is a {type(layer).__name__}, allowed: floating-point weights; merge the "
            "adapter into the model before `quantize` or `optimize`"
        )
    weight = layer.weight.detach()
    delta = weights.delta.detach().to(weight.device, torch.float32)
    return linear_from_weight((weight.float() + delta).type_as(weight))


def check_fit(lora: LoRA, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless all LoRA weights match a layer of the model in name and size."""
    for name, weights in lora.items():
        size, model_size = (len(weights.b), weights.a.shape[1]), sizes.get(name, "missing")
        if model_size != size:
            raise ValueError(
                f"the adapter does not fit: {name} is {size} in the adapter, {model_size} in the "
                "model"
            )


def linear_sizes(model: Llama) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of all layers to which an adapter can be attached, by name.

    Layers that already have an adapter are included. Packed layers are not: attach adapters before
    `optimize`, or do not optimize.
    """
    return {
        name.replace(".base", ""): layer_size(model.get_submodule(name))
        for name in linear_layer_names(model)
    }


def layer_size(layer: Any) -> tuple[int, int]:
    """Return the number of outputs and of inputs."""
    return len(layer.weight), layer.in_features


def is_attached(layer: nn.Module, weights: LoRAWeights) -> bool:
    """True if the LoRA weights are attached to a layer, also beneath another adapter."""
    return isinstance(layer, LoRALinear) and (
        layer.lora is weights or is_attached(layer.base, weights)
    )


def detach_layer(layer: nn.Module, weights: LoRAWeights, name: str) -> nn.Module:
    """Return the layer without the LoRA weights; other adapters stay attached."""
    if not isinstance(layer, LoRALinear):
        raise ValueError(f"{name}: the adapter is not attached to this model")
    if layer.lora is weights:
        return layer.base
    return LoRALinear(detach_layer(layer.base, weights, name), layer.lora, layer.dropout)
