"""How a run begins, what of a model it trains, and by how much in which step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llama32.model import Llama


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. The defaults suit a model of a few million parameters."""

    steps: int
    peak_rate: float = 3e-3
    warmup: int = 200  # steps
    final_rate: float = 0.05  # of the peak
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # on matrices; norms and embeddings are left alone
    clip: float = 1.0  # norm of the whole gradient
    seed: int = 0  # of dropout
    data: str = ""  # what tells it from other data: a run goes on with the same only
    save_every: int = 300  # steps between held-out loss, and a checkpoint to resume from
    autocast: torch.dtype | None = torch.bfloat16  # of matrix products; the weights stay fp32
    recompute: bool = False  # layers keep no activations and run forward twice: less memory


def initialize(model: Llama, seed: int = 0) -> None:
    """Normal weights of deviation 0.02; what writes to the residual stream is scaled down by
    sqrt(2L), so that the stream keeps its size through the layers. (GPT-2, section 2.3)"""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # a norm starts as the identity
            nn.init.ones_(weight)
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * len(model.layers)) if writes else 0.02
        nn.init.normal_(weight, std=deviation, generator=draw)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What requires gradients; ValueError if it is nothing, or too coarse to be trained."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise ValueError("training: no weight requires a gradient")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(
                f"training: {name} is in {weight.dtype}, in which small steps are lost; load the "
                "model with dtype=torch.float32, or train an adapter (add_lora)"
            )
    return weights


def groups(weights: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices decay; norms and embeddings do not."""
    decayed = [w for name, w in weights.items() if w.ndim > 1 and "embed" not in name]
    others = [w for name, w in weights.items() if w.ndim == 1 or "embed" in name]
    both = (decayed, recipe.weight_decay), (others, 0.0)
    return [{"params": some, "weight_decay": decay} for some, decay in both if some]


def learning_rate(step: int, recipe: Recipe) -> float:
    """A line up to the peak, then half a cosine down to `final_rate` of it."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    low = recipe.final_rate
    return recipe.peak_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
