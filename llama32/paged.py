"""Attention of packed queries over paged keys and values.

Each form takes the queries of a `Batch`, the pages `(P, C, K, D)` of one layer, into which the new
keys and values are already written, and the batch. `eager` and `fused` take one sequence at a
time: what they do is plain to see, and a sequence's result cannot depend on its neighbours.
`flash` hands the page table to the kernel inside PyTorch.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from llama32 import attention
from llama32.attention import Attend
from llama32.batch import Batch

PagedAttend = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]


def one_by_one(
    attend: Attend,
    q: Float[Tensor, "N H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
) -> Float[Tensor, "N H D"]:
    """Sequence after sequence through an attention that knows no pages."""
    counts = [len(span.tokens) for span in batch.spans]
    mixed = [
        attend(rows, read(keys, span.pages, span.length), read(values, span.pages, span.length))
        for rows, span in zip(q.split(counts), batch.spans, strict=True)
    ]
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


eager: PagedAttend = partial(one_by_one, attention.eager)
fused: PagedAttend = partial(one_by_one, attention.fused)


def read(
    pool: Float[Tensor, "P C K D"], pages: Sequence[int], length: int
) -> Float[Tensor, "{length} K D"]:
    """The first `length` slots of a sequence: a view where its pages lie in a row, else a copy."""
    used = pages[: -(-length // pool.shape[1])]
    first, last = used[0], used[-1]
    if all(page == first + i for i, page in enumerate(used)):
        return pool[first : last + 1].flatten(0, 1)[:length]
    return pool[torch.tensor(used, device=pool.device)].flatten(0, 1)[:length]


def flash(
    q: Float[Tensor, "N H D"],
    keys: Float[Tensor, "P C K D"],
    values: Float[Tensor, "P C K D"],
    batch: Batch,
) -> Float[Tensor, "N H D"]:
    """Flash attention over all sequences at once; not yet run on a GPU.

    From torch 2.12 the kernel walks the page table. `num_splits=1` is no matter of taste: with
    more, its paged form gives wrong rows (pytorch issues 179760, 194167), and with one a row's
    bits do not depend on the batch. In 2.11 the pages are gathered first.
    """
    # Imported late: it pulls in torch's compiler, a second that only a GPU earns back.
    from torch.nn.attention.varlen import varlen_attn

    starts: Tensor | None = None
    paging: dict[str, Any] = {}
    if walks_pages(varlen_attn):
        paging = {"block_table": batch.page_table, "seqused_k": batch.lengths}
        paging |= {"num_splits": 1, "enable_gqa": True}
    else:
        starts = pad(batch.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        keys, values = (
            torch.cat([read(pool, span.pages, span.length) for span in batch.spans])
            for pool in (keys, values)
        )
    mixed = varlen_attn(
        q,
        keys,
        values,
        batch.query_starts,
        starts,
        max(len(span.tokens) for span in batch.spans),
        max(span.length for span in batch.spans),
        window_size=(-1, 0),  # causal, the last query seeing all keys
        **paging,
    )
    assert isinstance(mixed, Tensor)  # a pair only where the log-sum-exp is asked for
    return mixed


@cache
def walks_pages(kernel: Callable[..., Any]) -> bool:
    """Whether this torch's flash attention takes a page table: from 2.12 on."""
    return "block_table" in inspect.signature(kernel).parameters


PAGE_SIZE = 256  # slots; flash attention takes pages of this size or a multiple of it


def fastest(device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int) -> PagedAttend:
    """The fastest form that this device, dtype and shape allow: chosen once, before a run."""
    can_flash = (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and page_size % PAGE_SIZE == 0
    )
    return flash if can_flash else fused
