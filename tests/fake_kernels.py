"""A slow CPU reference with the interface of flash attention, for tests of the callers."""

import math

import torch
from torch import Tensor

from llama32 import attention


def slow_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    used: Tensor,
    max_query: int,
    max_key: int,
) -> tuple[Tensor, Tensor]:
    """Attend sequence by sequence; rows that flash attention leaves uninitialized are nan."""
    for x in (query_starts, key_starts, used):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert len(query_starts) == len(key_starts) == len(used) + 1
    assert query_starts[-1] == len(q)
    mixed, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan).mT
    for i, count in enumerate(used.tolist()):
        rows = slice(*query_starts[i : i + 2].tolist())
        assert rows.stop - rows.start <= max_query
        assert count <= max_key
        if count:
            keys = k[key_starts[i] :][:count].repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = q[rows].transpose(0, 1) @ keys.permute(1, 2, 0) / math.sqrt(q.shape[2])
            mask = attention.causal(len(q[rows]), count, q.device)
            lse[:, rows] = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
            mixed[rows] = attention.eager(
                q[rows], k[key_starts[i] :][:count], v[key_starts[i] :][:count]
            )
    return mixed, lse
