"""Attention within documents packed end to end: a block-diagonal causal mask, for training.

On a GPU, a single call of variable-length flash attention covers all documents; elsewhere each
document is a call of its own. The GPU path has not run on a GPU yet.
"""

from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler: takes a second

from llama32.attention import per_document
from llama32.cache.flash_attention import supports_flash

CAUSAL_OPTIONS: dict[str, Any] = {"window_size": (-1, 0)}
if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 needs no flag
    CAUSAL_OPTIONS["enable_gqa"] = True


@dataclass(frozen=True)
class DocumentAttention:
    """Causal attention within each document of `(N,)` packed tokens, with gradients.

    No document attends to another.
    """

    lengths: tuple[int, ...]

    def __call__(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N H D"]:
        if not supports_flash(q.device, q.dtype, q.shape[-1]):
            return per_document(q, k, v, self.lengths)
        cu_seqlens, max_length = self.cu_seqlens.to(q.device, non_blocking=True), max(self.lengths)
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **CAUSAL_OPTIONS)
        assert isinstance(out, Tensor)
        return out

    @cached_property
    def cu_seqlens(self) -> Int32[Tensor, " documents1"]:
        """Offset of each document, and the end of the last."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
