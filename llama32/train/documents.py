"""Attention within documents that are packed end to end, the block-diagonal form of training.

On a GPU it is one call of flash attention, which knows where documents end; elsewhere they go one
by one. The GPU's way is not yet run on one.
"""

from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn  # brings in torch's compiler: a second

from llama32.attention import one_by_one
from llama32.flash import has_flash

CAUSAL: dict[str, Any] = {"window_size": (-1, 0)}
if "enable_gqa" in signature(varlen_attn).parameters:  # 2.11 takes fewer heads of keys as it is
    CAUSAL["enable_gqa"] = True


@dataclass(frozen=True)
class Documents:
    """Attention within each of several documents that lie end to end in `(N,)` tokens, with
    gradients: in training none of them sees another."""

    lengths: tuple[int, ...]

    def __call__(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N H D"]:
        if not has_flash(q.device, q.dtype, q.shape[-1]):
            return one_by_one(q, k, v, self.lengths)
        starts, longest = self.starts.to(q.device, non_blocking=True), max(self.lengths)
        mixed = varlen_attn(q, k, v, starts, starts, longest, longest, **CAUSAL)
        assert isinstance(mixed, Tensor)
        return mixed

    @cached_property
    def starts(self) -> Int32[Tensor, " documents1"]:
        """Of the documents, and the end of the last."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
