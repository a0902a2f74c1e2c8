"""Rotary position embedding: a position becomes a rotation of queries and keys.

Pair r of a head is rotated by the angle `position * inv_freq[r]`, so the product of a query and a
key depends on their distance only. (RoFormer, Su et al. 2021; in the Hub's split-half order pair r
consists of the coordinates r and R + r)
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama32.config import LlamaConfig

CosSin = tuple[Float[Tensor, "*#B 1 R"], Float[Tensor, "*#B 1 R"]]


def compute_inv_freq(config: LlamaConfig) -> Float[Tensor, " R"]:
    """Return radians per token for each rotary pair, slowed for long context.

    Fast pairs keep their speed, slow pairs are divided by `factor`, and the band between is
    blended, so no pair jumps. Always fp32 on the CPU: at position 100,000 a bf16 angle errs by
    many turns, and the `pow` of another device may differ in the last bit.
    (Llama 3.1 report, section 3.4.2; `rope_scaling` in config.json)
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    wavelengths = 2 * math.pi / inv_freq
    num_rotations = scaling.original_max_position_embeddings / wavelengths
    smooth = (num_rotations - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)  # 1: many rotations within the original context, 0: hardly one
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def rotary_cos_sin(positions: Int[Tensor, "*B"], inv_freq: Float[Tensor, " R"]) -> CosSin:
    """Return cosines and sines of the angles at any `positions`, fp32, without a table.

    The axis of size 1 broadcasts over the heads of queries and keys.
    """
    angles = positions[..., None, None].float() * inv_freq
    return angles.cos(), angles.sin()


def apply_rotary(x: Float[Tensor, "*B heads D"], cos_sin: CosSin) -> Float[Tensor, "*B heads D"]:
    """Rotate the pairs of every head, in fp32; the result has the dtype of x."""
    cos, sin = cos_sin
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
