"""Training settings: initial weights, trained parameters, learning rate by step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llama32.model import Llama


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. The defaults suit a model of a few million parameters."""

    steps: int
    peak_rate: float = 3e-3
    warmup: int = 200  # steps
    final_rate: float = 0.05  # as a share of the peak
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # for matrices; norms and embeddings do not decay
    clip: float = 1.0  # maximum norm of the whole gradient
    seed: int = 0  # for dropout
    data: str = ""  # fingerprint of the training data: a run resumes with the same data only
    save_every: int = 300  # steps between checkpoints; each also measures the held-out loss
    autocast: torch.dtype | None = torch.bfloat16  # for matrix products; the weights stay fp32
    activation_checkpointing: bool = False  # run layers forward twice instead of keeping outputs


def initialize(model: Llama, seed: int = 0) -> None:
    """Draw fresh weights from a normal distribution of deviation 0.02.

    Layers that write to the residual stream are scaled down by sqrt(2L): the stream then keeps a
    constant size through the layers. (GPT-2, section 2.3)
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # a norm starts as the identity
            nn.init.ones_(weight)
            continue
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * len(model.layers)) if is_residual else 0.02
        nn.init.normal_(weight, std=deviation, generator=generator)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name.

    Raises ValueError for a model without trainable parameters, or with a dtype other than fp32.
    """
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


def parameter_groups(
    weights: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices decay, norms and embeddings do not."""
    decayed = [w for name, w in weights.items() if w.ndim > 1 and "embed" not in name]
    undecayed = [w for name, w in weights.items() if w.ndim == 1 or "embed" in name]
    groups = (decayed, config.weight_decay), (undecayed, 0.0)
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to `final_rate`."""
    if step < config.warmup:
        return config.peak_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = config.final_rate
    return config.peak_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
