"""Attention of packed queries over paged keys and values.

Each form takes the queries of a `Batch`, the pages `(P, C, K, D)` of one layer, into which the new
keys and values are already written, and the batch. `eager` and `fused` take one sequence at a
time: what they do is plain to see, and a sequence's result cannot depend on its neighbours. The
form for a GPU is in `flash.py`.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama32 import attention
from llama32.attention import Attend
from llama32.batch import Batch

PagedAttend = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]

QUERY_BLOCK = 64  # costs nothing measurable against whole prompts, up to long ones in bf16


def one_by_one(
    attend: Attend,
    q: Float[Tensor, "N H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
) -> Float[Tensor, "N H D"]:
    """Sequence after sequence through an attention that knows no pages.

    Of a prompt, at most QUERY_BLOCK queries at once, cut where their positions are multiples of
    it: so the shapes, and with them the bits, depend on the sequence alone and not on how its
    prompt was cut into steps; and no more than a block of the mask is in memory.
    """
    mixed: list[Tensor] = []
    row = 0
    for span, where in zip(batch.spans, batch.reads, strict=True):
        k, v = read(keys, where, span.length), read(values, where, span.length)
        for start, stop in blocks(span.start, span.length):
            mixed.append(attend(q[row : row + stop - start], k[:stop], v[:stop]))
            row += stop - start
    return join(mixed, q)


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The positions from `start` up to `stop`, cut at every multiple of QUERY_BLOCK."""
    while start < stop:
        end = min(start - start % QUERY_BLOCK + QUERY_BLOCK, stop)
        yield start, end
        start = end


def join(mixed: list[Tensor], q: Float[Tensor, "N H D"]) -> Float[Tensor, "N H D"]:
    """The pieces in one, with zeros for those rows of `q` that belong to no sequence."""
    rows = sum(map(len, mixed))
    if rows < len(q):
        mixed = [*mixed, torch.zeros_like(q[rows:])]
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


eager: PagedAttend = partial(one_by_one, attention.eager)


def fused(
    q: Float[Tensor, "N H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
) -> Float[Tensor, "N H D"]:
    """The same by PyTorch's fused kernels.

    Decoding many short sequences is calls, not arithmetic. So for one query each the pool is
    turned to heads first once, and not each sequence's share of it: the same bits in half the time.
    """
    if batch.max_query > 1:
        return one_by_one(attention.fused, q, keys, values, batch)
    K, D = keys.shape[-2:]
    turned = [pool.flatten(0, 1).transpose(0, 1).unsqueeze(0) for pool in (keys, values)]
    queries = q[: len(batch.spans)].reshape(len(batch.spans), 1, K, -1, D)  # as `_one_query`
    mixed: list[Tensor] = []
    for query, where, span in zip(queries.unbind(), batch.reads, batch.spans, strict=True):
        if isinstance(where, slice):
            k, v = (pool[:, :, where] for pool in turned)  # (1, K, S, D)
        else:
            copies = (read(pool, where, span.length) for pool in (keys, values))
            k, v = (x.transpose(0, 1).unsqueeze(0) for x in copies)
        mixed.append(scaled_dot_product_attention(query, k, v).view(1, -1, D))
    return join(mixed, q)


def read(
    pool: Float[Tensor, "P C K D"], where: slice | Int[Tensor, " pages"], length: int
) -> Float[Tensor, "{length} K D"]:
    """A sequence's slots: a view where they lie in a row, else a copy."""
    if isinstance(where, slice):
        return pool.flatten(0, 1)[where]
    return pool[where].flatten(0, 1)[:length]


def gathered(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
) -> Float[Tensor, "B H D"]:
    """Decoding, one query per sequence, all at once: each takes the pages of its whole row of the
    table and masks what it does not have. More to read, but its shapes do not change from step to
    step: the form for torch.compile, and for CUDA graphs where no kernel walks the table."""
    k, v = (pool[batch.page_table].flatten(1, 2) for pool in (keys, values))  # (B, S, K, D)
    visible = torch.arange(k.shape[1], device=q.device) < batch.lengths.unsqueeze(1)  # (B, S)
    # Zeros, too, in slots that are not its own: a nan that another left there would get through.
    k, v = (x.where(visible.view(*visible.shape, 1, 1), 0) for x in (k, v))
    return attention.fused(q.unsqueeze(1), k, v, visible.unsqueeze(1)).squeeze(1)
