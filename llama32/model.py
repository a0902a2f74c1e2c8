"""The Llama in reading order: norm, attention, mlp, block, model.

Nothing here knows about caches, masks, devices or batches. A layer passes queries, keys and values
to `attend` and receives mixed values (the attention output), so the same code trains on padded
`(B, T)` tokens and serves the packed `(N,)` tokens of many sequences. The number of heads comes
from the projections, not from the config, so the same code also runs a sharded layer, a quantized
layer, or a layer with LoRA.
"""

from collections.abc import Callable, Sequence
from types import EllipsisType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llama32.attention import Attend, fused
from llama32.config import LlamaConfig
from llama32.rope import CosSin, apply_rotary, compute_inv_freq, rotary_cos_sin


class RMSNorm(nn.Module):
    """Scale every vector to length sqrt(E), then each coordinate by a learned weight.

    LayerNorm without mean and bias, two parts that turned out not to matter. Squares are summed in
    fp32, because bf16 would lose the small squares.
    (Zhang & Sennrich 2019)
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        upcast = x.float()
        upcast = upcast * torch.rsqrt(upcast.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * upcast.type_as(x)


class Attention(nn.Module):
    """Project to queries, keys and values, rotate by position, mix with `attend`, project back.

    Fewer key and value heads than query heads keep the cache small.
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
        self, x: Float[Tensor, "*B E"], cos_sin: CosSin, attend: Attend
    ) -> Float[Tensor, "*B E"]:
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (*B, H, D)
        k = self.k_proj(x).unflatten(-1, heads)  # (*B, K, D)
        v = self.v_proj(x).unflatten(-1, heads)  # (*B, K, D)
        y = attend(apply_rotary(q, cos_sin), apply_rotary(k, cos_sin), v)  # (*B, H, D)
        return self.o_proj(y.flatten(-2))  # (*B, E)


class SwiGLU(nn.Module):
    """Gated MLP: an up-projection times the SiLU of a gate projection, projected back down.

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
    """A layer: attention mixes tokens, the mlp transforms each; both add to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Float[Tensor, "*B E"], cos_sin: CosSin, attend: Attend
    ) -> Float[Tensor, "*B E"]:
        x = x + self.attn(self.attn_norm(x), cos_sin, attend)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The whole model, from token ids to logits.

    model(tokens)                             plain causal attention
    model(tokens, attend=mine)                your own attention function in every layer
    model(tokens, positions, attention_fns)   an attention function per layer, for a KV cache
    """

    inv_freq: Float[Tensor, " R"]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("inv_freq", compute_inv_freq(config), persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "*B"],
        positions: Int[Tensor, "*#B"] | None = None,
        attention_fns: Sequence[Attend] | None = None,
        *,
        attend: Attend = fused,
        logits_at: Tensor | slice | EllipsisType = ...,
    ) -> Float[Tensor, "*R V"]:
        """Return next-token logits after every token.

        `positions` default to 0, 1, 2, ... along the last axis of `tokens`. `logits_at` selects the
        tokens that get logits, by default all. A prompt needs logits for the last token only, and
        the product with a vocabulary of 128,256 costs as much as several layers.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if attention_fns is None:
            attention_fns = [attend] * len(self.layers)
        cos_sin = rotary_cos_sin(positions, self.inv_freq)
        x = self.embed(tokens)  # (*B, E)
        for layer, layer_attend in zip(self.layers, attention_fns, strict=True):
            x = layer(x, cos_sin, layer_attend)
        return self.lm_head(self.norm(x[logits_at]))  # (*R, V)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        """Move or cast the module, but keep `inv_freq` in fp32.

        In bf16 the angles of a long context are noise. `to`, `half` and `cuda` call this method.
        """
        super()._apply(fn, recurse)
        self.inv_freq = compute_inv_freq(self.config).to(self.norm.weight.device)
        return self
