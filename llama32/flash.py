"""Flash attention over the paged cache on a GPU: the kernel inside PyTorch, no Triton.

The kernel takes packed sequences, and may be told for each where its keys begin in a pool and how
many of them count (`seqused_k`). That is enough for pages, in every torch from 2.11 on: a sequence
whose pages lie in a row is read in place, and in decoding every page is a sequence of its own. The
kernel's own page table (from 2.12) is not used: it wants larger pages, splits long contexts by how
many there are, and does so wrongly (pytorch issues 179760, 194167).

Not yet run on a GPU; on a CPU it is tested with a kernel that does the same slowly.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from llama32.batch import Batch
from llama32.paged import PagedAttend, fused, gathered, join, read

# Slots. A page of at most this size is one block of the kernel for heads of up to 128, so there is
# nothing that it could split depending on the company.
LONGEST_PAGE = 128

# q (N, H, D), k and v (S, K, D), first rows of each sequence in q and in k (B + 1), how many rows
# it has in k (B), the most that one has in q and in k -> mixed (N, H, D), log-sum-exp (H, N)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def kernel(
    q: Float[Tensor, "N H D"],
    k: Float[Tensor, "S K D"],
    v: Float[Tensor, "S K D"],
    query_starts: Int32[Tensor, " B1"],
    key_starts: Int32[Tensor, " B1"],
    used: Int32[Tensor, " B"],
    max_query: int,
    max_key: int,
) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "H N"]]:
    """Causal attention of packed sequences, the last query seeing all keys.

    `key_starts` may come in any order, and its last entry is not read. Of a sequence without keys
    the result means nothing. `torch.nn.attention.varlen` is the public name of this operator, and
    hides `seqused_k` in 2.11.
    """
    mixed, sums, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, query_starts, key_starts, max_query, max_key),
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        seqused_k=used,
    )
    return mixed, sums


def flash(
    q: Float[Tensor, "N H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
    kernel: Kernel = kernel,
) -> Float[Tensor, "N H D"]:
    """All sequences of a batch at once."""
    if batch.max_query == 1:
        return join([by_pages(q[: len(batch.lengths)], keys, values, batch, kernel)], q)
    if batch.is_in_place:
        k, v = keys.flatten(0, 1), values.flatten(0, 1)  # (P * C, K, D)
    else:
        spans = list(zip(batch.reads, batch.spans, strict=True))
        k, v = (
            torch.cat([read(pool, where, span.length) for where, span in spans])
            for pool in (keys, values)
        )
    mixed, _ = kernel(
        *(q[: batch.num_tokens], k, v, batch.query_starts, batch.key_starts, batch.lengths),
        batch.max_query,
        batch.max_length,
    )
    return join([mixed], q)


def by_pages(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
    kernel: Kernel = kernel,
) -> Float[Tensor, "B H D"]:
    """Decoding, one query per sequence: each meets every page of its sequence alone, and what
    comes of them is merged. So one long context keeps a whole GPU busy, as many short ones do.
    (flash-decoding, Dao et al. 2023)
    """
    rows = batch.page_rows
    B, W = rows.used.shape
    mixed, sums = kernel(
        *(q.repeat_interleave(W, 0), keys.flatten(0, 1), values.flatten(0, 1)),
        *(rows.queries, rows.starts, rows.used.flatten()),
        1,
        batch.page_size,
    )
    if W == 1:
        return mixed
    empty = (rows.used == 0).unsqueeze(-1)
    sums = sums.mT.unflatten(0, (B, W)).masked_fill(empty, -math.inf)  # (B, W, H)
    parts = mixed.unflatten(0, (B, W)).masked_fill(empty.unsqueeze(-1), 0)  # (B, W, H, D)
    return merge(parts, sums).type_as(q)


def merge(parts: Float[Tensor, "B W H D"], sums: Float[Tensor, "B W H"]) -> Float[Tensor, "B H D"]:
    """Attention over all keys, from that over each of W shares of them and the logarithms of what
    each share's softmax was divided by. fp32; -inf is a share without keys."""
    weights = (sums - sums.amax(1, keepdim=True)).exp().unsqueeze(-1)  # (B, W, H, 1)
    return add_up(parts.float() * weights) / add_up(weights)


def add_up(x: Float[Tensor, "B W H D"]) -> Float[Tensor, "B H D"]:
    """The sum over W by neighbouring pairs, again and again: zeros at the end, of which longer
    company brings more, do not change a bit of it."""
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.cat((x, torch.zeros_like(x[:, :1])), 1)
        x = x[:, ::2] + x[:, 1::2]
    return x.squeeze(1)


def fixed_shape(attend: PagedAttend) -> PagedAttend:
    """What does the same for decoding by tensors alone: to be compiled, or recorded as a graph."""
    return by_pages if attend is flash else gathered


def fastest(device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int) -> PagedAttend:
    """The fastest form that this device, dtype and shape allow: chosen once, before a run."""
    can_flash = has_flash(device, dtype, head_dim) and page_size <= LONGEST_PAGE
    return flash if can_flash else fused


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel takes these."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
    )
