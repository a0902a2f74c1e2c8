"""Attention of packed queries over paged keys and values.

Every backend takes the queries of a `Batch`, the pages of one layer, and the `Batch`; the pages
already contain the keys and values of the new tokens. `eager_per_sequence` and `sdpa_per_sequence`
process one sequence at a time: plain code, and batch-invariant, because no result can depend on
another sequence. `flash_attention.py` has the backend for GPUs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama32 import attention
from llama32.attention import Attend
from llama32.cache.batch import Batch

PagedAttend = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
PackedQueries = Float[Tensor, "N H D"]  # also the shape of the mixed values
PagePool = Float[Tensor, "P C K D"]  # keys or values of one layer

QUERY_TILE = 64  # tiles cost no measurable time, except for long prompts in bf16


def per_sequence(
    attend: Attend, q: PackedQueries, keys: PagePool, values: PagePool, batch: Batch
) -> PackedQueries:
    """Apply attention without pages to one sequence at a time.

    Prompts are cut into tiles of QUERY_TILE queries, at positions that are multiples of QUERY_TILE.
    The shapes, and with them the bits of the results, then depend on the sequence alone and not on
    the prefill chunks. Also, only one tile of the mask is in memory.
    """
    mixed: list[Tensor] = []
    row = 0
    for span, location in zip(batch.spans, batch.kv_locations, strict=True):
        k, v = (gather_slots(pool, location, span.length) for pool in (keys, values))
        for start, stop in query_tiles(span.start, span.length):
            mixed.append(attend(q[row : row + stop - start], k[:stop], v[:stop]))
            row += stop - start
    return concat_and_pad(mixed, q)


def query_tiles(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Split the range from `start` to `stop` at every multiple of QUERY_TILE."""
    while start < stop:
        end = min(start - start % QUERY_TILE + QUERY_TILE, stop)
        yield start, end
        start = end


def concat_and_pad(mixed: list[Tensor], q: PackedQueries) -> PackedQueries:
    """Concatenate results, with zeros for the padding rows at the end of `q`."""
    rows = sum(map(len, mixed))
    if rows < len(q):
        mixed = [*mixed, torch.zeros_like(q[rows:])]
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


eager_per_sequence: PagedAttend = partial(per_sequence, attention.eager)


def sdpa_per_sequence(
    q: PackedQueries, keys: PagePool, values: PagePool, batch: Batch
) -> PackedQueries:
    """Compute `eager_per_sequence` with PyTorch's fused kernels.

    Decoding many short sequences spends more time on operator calls than on arithmetic. So with one
    query per sequence, the whole pool is transposed once, instead of the slots of every sequence:
    the same bits in half the time.
    """
    if batch.max_query > 1:
        return per_sequence(attention.fused, q, keys, values, batch)
    K, D = keys.shape[-2:]
    heads_first = [pool.flatten(0, 1).transpose(0, 1).unsqueeze(0) for pool in (keys, values)]
    B = len(batch.spans)
    queries = q[:B].reshape(B, 1, K, -1, D)  # (B, 1, K, H/K, D), as in `attention._decode`
    mixed: list[Tensor] = []
    for query, location, span in zip(queries, batch.kv_locations, batch.spans, strict=True):
        if isinstance(location, slice):
            k, v = (pool[:, :, location] for pool in heads_first)  # (1, K, S, D)
        else:
            copies = (gather_slots(pool, location, span.length) for pool in (keys, values))
            k, v = (x.transpose(0, 1).unsqueeze(0) for x in copies)
        mixed.append(scaled_dot_product_attention(query, k, v).view(1, -1, D))
    return concat_and_pad(mixed, q)


def gather_slots(
    pool: PagePool, location: slice | Int[Tensor, " pages"], length: int
) -> Float[Tensor, "{length} K D"]:
    """Return the slots of a sequence: a view of adjacent pages, or a copy of scattered pages."""
    if isinstance(location, slice):
        return pool.flatten(0, 1)[location]
    return pool[location].flatten(0, 1)[:length]


def gather_attention(
    q: PackedQueries, keys: PagePool, values: PagePool, batch: Batch
) -> PackedQueries:
    """Decode all sequences in one call, with static shapes.

    Gathers every page of the page table and masks the slots without a token. This function reads
    more memory, but its shapes do not change from step to step, as torch.compile and CUDA graphs
    require. CUDA graphs use this function where flash attention is not supported.
    """
    k, v = (pool[batch.page_table].flatten(1, 2) for pool in (keys, values))  # (B, S, K, D)
    mask = torch.arange(k.shape[1], device=q.device) < batch.lengths.unsqueeze(1)  # (B, S)
    # Masked slots get zeros, because a nan of another sequence would pass through the mask.
    k, v = (x.where(mask.view(*mask.shape, 1, 1), 0) for x in (k, v))
    return attention.fused(q.unsqueeze(1), k, v, mask.unsqueeze(1)).squeeze(1)
