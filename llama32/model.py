"""The Llama, top to bottom: norm, attention, mlp, block, model.

Nothing here knows of caches, masks, devices or batches. A layer hands its queries, keys and
values to `attend` and gets mixed values back, so the same lines train on padded `(B, T)` tokens
and serve the packed `(N,)` tokens of many sequences. Sizes are read off the weights, never off
the config, so a layer that was cut, grown or quantized from outside runs the same lines too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llama32.attention import Attend, fused
from llama32.config import LlamaConfig
from llama32.rope import Rotation, rotary_speeds, rotate, rotation


class RMSNorm(nn.Module):
    """Scale every vector to length sqrt(E), then each coordinate by a learned weight.

    No mean is taken out and no bias added: LayerNorm without the two parts that turned out not
    to matter. Squares are summed in fp32, where bf16 would lose the small ones.
    (Zhang & Sennrich 2019)
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.type_as(x)


class Attention(nn.Module):
    """Project to queries, keys and values, turn by position, let `attend` mix, project back.

    There are fewer key and value heads than query heads, which is what keeps the cache small.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D, bias=False)
        self.k_proj = nn.Linear(E, K * D, bias=False)
        self.v_proj = nn.Linear(E, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, E, bias=False)

    def forward(
        self, x: Float[Tensor, "*B E"], by: Rotation, attend: Attend
    ) -> Float[Tensor, "*B E"]:
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (*B, H, D)
        k = self.k_proj(x).unflatten(-1, heads)  # (*B, K, D)
        v = self.v_proj(x).unflatten(-1, heads)  # (*B, K, D)
        y = attend(rotate(q, by), rotate(k, by), v)  # (*B, H, D)
        return self.o_proj(y.flatten(-2))  # (*B, E)


class SwiGLU(nn.Module):
    """Two views of each vector, one gating the other, brought back to the width.

    (GLU Variants Improve Transformer, Shazeer 2020)
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(E, F_, bias=False)
        self.up_proj = nn.Linear(E, F_, bias=False)
        self.down_proj = nn.Linear(F_, E, bias=False)

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention looks across tokens, the mlp at each alone; each adds to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Float[Tensor, "*B E"], by: Rotation, attend: Attend
    ) -> Float[Tensor, "*B E"]:
        x = x + self.attn(self.attn_norm(x), by, attend)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Token ids to logits.

    model(tokens)                        plain causal attention
    model(tokens, attend=mine)           your own attention in every layer
    model(tokens, positions, attends)    one attention per layer: a KV cache is such a list
    """

    rotary_speeds: Float[Tensor, " R"]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("rotary_speeds", rotary_speeds(config), persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "*B"],
        positions: Int[Tensor, "*#B"] | None = None,
        attends: Sequence[Attend] | None = None,
        *,
        attend: Attend = fused,
        rows: Any = ...,
    ) -> Float[Tensor, "*R V"]:
        """Logits for each token's successor.

        `positions` count from 0 along the last axis of `tokens` unless given. `rows` indexes the
        tokens whose logits are wanted (all by default): the unembedding of a vocabulary of
        128,256 costs as much as several layers, and a prompt needs only its last row.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if attends is None:
            attends = [attend] * len(self.layers)
        by = rotation(positions, self.rotary_speeds)
        x = self.embed(tokens)  # (*B, E)
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, by, attend)
        return self.lm_head(self.norm(x[rows]))  # (*R, V)

    def _apply(self, fn: Any, recurse: bool = True) -> "Llama":
        """Every move or cast of the module comes through here, and no cast may reach the
        rotary speeds: in bf16 the angles of a long context are noise."""
        super()._apply(fn, recurse)
        self.rotary_speeds = rotary_speeds(self.config).to(self.norm.weight.device)
        return self
