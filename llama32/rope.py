"""Rotary position embedding: a position becomes a rotation of queries and keys.

Pair r of a head is turned by `position * speed[r]`, so that the product of a query and a key
depends on their distance only. (RoFormer, Su et al. 2021; the Hub's split-half order, in which
pair r is made of the coordinates r and R + r)
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama32.config import LlamaConfig

Rotation = tuple[Float[Tensor, "*#B 1 R"], Float[Tensor, "*#B 1 R"]]


def rotary_speeds(config: LlamaConfig) -> Float[Tensor, " R"]:
    """Radians per token for each rotary pair, slowed for long context.

    Fast pairs keep their speed, slow pairs are divided by `factor`, and the band between is
    blended, so no pair jumps. fp32 on the CPU always: at position 100,000 a bf16 angle errs by
    many turns, and another device's `pow` may differ in the last bit.
    (Llama 3.1 report, section 3.4.2; `rope_scaling` in config.json)
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    speeds = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    bend = config.rope_scaling
    if bend is None:
        return speeds
    wavelengths = 2 * math.pi / speeds
    turns = bend.original_max_position_embeddings / wavelengths
    keep = (turns - bend.low_freq_factor) / (bend.high_freq_factor - bend.low_freq_factor)
    keep = keep.clamp(0, 1)  # 1: turns often within the original context, 0: hardly
    return (1 - keep) * speeds / bend.factor + keep * speeds


def rotation(positions: Int[Tensor, "*B"], speeds: Float[Tensor, " R"]) -> Rotation:
    """Cosines and sines of the angles at `positions`, fp32, any position: there is no table.

    The axis of size 1 stands where queries and keys have their heads.
    """
    angles = positions[..., None, None].float() * speeds
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "*B heads D"], by: Rotation) -> Float[Tensor, "*B heads D"]:
    """Turn the pairs of every head, in fp32 whatever the dtype of x, which the result keeps."""
    cos, sin = by
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
