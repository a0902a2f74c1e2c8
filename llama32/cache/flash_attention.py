"""Flash attention over the paged cache on a GPU, with PyTorch's built-in kernel, without Triton.

The kernel takes packed sequences, and for each sequence a first key in a pool and a number of keys
(`seqused_k`). In torch 2.11 and later, these two numbers are enough to support pages: a sequence
with adjacent pages is read in place, and in decode every page is passed as a separate sequence. The
kernel's own page table (torch 2.12 and later) is not used: the kernel then requires larger pages,
splits long contexts depending on the number of sequences, and returns NaN or wrong rows after a
split (pytorch issues 179760, 194167).

Not yet run on a GPU; tested on a CPU with a slow reference implementation of the kernel.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from llama32.cache.batch import Batch
from llama32.cache.paged_attention import (
    PackedQueries,
    PagedAttend,
    PagePool,
    concat_and_pad,
    gather_attention,
    gather_slots,
    sdpa_per_sequence,
)

# In slots. For a head_dim of up to 128, the kernel processes a page of at most this size as one
# tile, so there is nothing to split, and no split can depend on the batch.
MAX_PAGE_SIZE = 128

Kernel = Callable[..., tuple[Tensor, Tensor]]  # with the signature of `kernel`


def kernel(
    q: PackedQueries,
    k: Float[Tensor, "S K D"],
    v: Float[Tensor, "S K D"],
    query_starts: Int32[Tensor, " B1"],
    key_starts: Int32[Tensor, " B1"],
    used: Int32[Tensor, " B"],
    max_query: int,
    max_key: int,
) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "H N"]]:
    """Run causal attention on packed sequences; return mixed values and log-sum-exp.

    `query_starts` and `key_starts` are the first rows of every sequence in q and in k, `used` the
    number of keys; the last query sees all keys. `key_starts` may be in any order, and the last
    entry is not read. The result of a sequence without keys is undefined. The operator's public
    wrapper, `torch.nn.attention.varlen`, does not expose `seqused_k` in 2.11.
    """
    mixed, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, query_starts, key_starts, max_query, max_key),
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        seqused_k=used,
    )
    return mixed, lse


def flash(
    q: PackedQueries, keys: PagePool, values: PagePool, batch: Batch, kernel: Kernel = kernel
) -> PackedQueries:
    """Compute the attention of all sequences of a batch in one kernel call."""
    if batch.max_query == 1:
        return concat_and_pad([split_kv(q[: len(batch.lengths)], keys, values, batch, kernel)], q)
    if batch.is_contiguous:
        k, v = keys.flatten(0, 1), values.flatten(0, 1)  # (P * C, K, D)
    else:
        locations = list(zip(batch.kv_locations, batch.spans, strict=True))
        k, v = (
            torch.cat([gather_slots(pool, location, span.length) for location, span in locations])
            for pool in (keys, values)
        )
    mixed, _ = kernel(
        *(q[: batch.num_tokens], k, v, batch.query_starts, batch.key_starts, batch.lengths),
        batch.max_query,
        batch.max_length,
    )
    return concat_and_pad([mixed], q)


def split_kv(
    q: PackedQueries, keys: PagePool, values: PagePool, batch: Batch, kernel: Kernel = kernel
) -> PackedQueries:
    """Decode with one query per sequence: attend to each page separately, then merge the results.

    One long context then keeps the whole GPU busy, as many short contexts would. (flash-decoding,
    Dao et al. 2023)
    """
    pages = batch.pages_as_sequences
    B, W = pages.used.shape
    mixed, lse = kernel(
        *(q.repeat_interleave(W, 0), keys.flatten(0, 1), values.flatten(0, 1)),
        *(pages.queries, pages.starts, pages.used.flatten()),
        1,
        batch.page_size,
    )
    if W == 1:
        return mixed
    empty = (pages.used == 0).unsqueeze(-1)
    lse = lse.mT.unflatten(0, (B, W)).masked_fill(empty, -math.inf)  # (B, W, H)
    parts = mixed.unflatten(0, (B, W)).masked_fill(empty.unsqueeze(-1), 0)  # (B, W, H, D)
    return merge_partials(parts, lse).type_as(q)


def merge_partials(
    parts: Float[Tensor, "B W H D"], lse: Float[Tensor, "B W H"]
) -> Float[Tensor, "B H D"]:
    """Merge attention over each of W parts of the keys into attention over all keys, in fp32.

    `lse` is the log-sum-exp of each part, the logarithm of the softmax denominator; -inf for a part
    without keys.
    """
    weights = (lse - lse.amax(1, keepdim=True)).exp().unsqueeze(-1)  # (B, W, H, 1)
    return pairwise_sum(parts.float() * weights) / pairwise_sum(weights)


def pairwise_sum(x: Float[Tensor, "B W H D"]) -> Float[Tensor, "B H D"]:
    """Sum over W by adding neighbours, then neighbouring sums, and so on.

    Trailing zeros change no bit of the sum, and a longer sequence in the batch only appends zeros.
    """
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.cat((x, torch.zeros_like(x[:, :1])), 1)
        x = x[:, ::2] + x[:, 1::2]
    return x.squeeze(1)


def static_shape_variant(attend: PagedAttend) -> PagedAttend:
    """Return the decode variant of `attend` with static shapes, to compile or record as a graph."""
    return split_kv if attend is flash else gather_attention


def select_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int
) -> PagedAttend:
    """Return the fastest backend for the device, dtype and sizes: a choice made once per cache."""
    can_flash = supports_flash(device, dtype, head_dim) and page_size <= MAX_PAGE_SIZE
    return flash if can_flash else sdpa_per_sequence


def supports_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True if the kernel supports the device, dtype and head size."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
    )
