"""One step's tensors: the new tokens of several sequences, packed end to end.

Schedulers and loops think in lists; the model thinks in tensors. `Batch.pack` is the one place
where the first become the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from jaxtyping import Int, Int32
from torch import Tensor
from torch.nn.functional import pad


class Span(NamedTuple):
    """The next tokens of one sequence, and where its cache is."""

    tokens: Sequence[int]
    start: int  # how many tokens of the sequence are in the cache already
    pages: list[int]  # the sequence's pages in order, with room for `tokens`

    @property
    def length(self) -> int:
        """Tokens in context when this step is done."""
        return self.start + len(self.tokens)


class PageRows(NamedTuple):
    """Every page of every sequence as a sequence of its own, which holds one query: for kernels
    that take no page table. W pages each, as the page table is wide."""

    queries: Int32[Tensor, " BW1"]  # 0, 1, 2, ...
    starts: Int32[Tensor, " BW1"]  # first slot of each page, then one more that is not read
    used: Int32[Tensor, "B W"]  # slots of it that hold tokens of the sequence


@dataclass(frozen=True)
class Batch:
    """What one forward pass over the paged cache needs to know."""

    tokens: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]  # of each token in its sequence
    slots: Int[Tensor, " N"]  # where its key and value go: page * C + place in the page
    last: Int[Tensor, " B"]  # the row of each sequence's last token, the one to sample from
    # The same for kernels that walk the page table themselves:
    query_starts: Int32[Tensor, " B1"]  # first row of each sequence, then the row behind the last
    lengths: Int32[Tensor, " B"]  # tokens in context, new ones included
    page_table: Int32[Tensor, "B pages"]  # page ids, `spare` where a sequence has no more
    max_query: int  # no sequence has more new tokens
    max_length: int  # nor more in context
    # And for code on the host, which must not wait for the device to tell it:
    spans: tuple[Span, ...]
    page_size: int

    @classmethod
    def pack(
        cls,
        spans: Sequence[Span],
        page_size: int,
        device: torch.device | str = "cpu",
        *,
        rows: int | None = None,
        spare: int = 0,
    ) -> "Batch":
        """Lists to tensors, built on the host and moved in one go each.

        `rows` asks for a certain N: rows behind those of the sequences compute nothing that
        anybody reads, and write to the page `spare`.
        """
        counts = [len(span.tokens) for span in spans]
        if not counts or 0 in counts:
            raise ValueError("batch: every sequence needs at least one new token")
        ends = list(accumulate(counts))
        blank = (rows or ends[-1]) - ends[-1]
        if blank < 0:
            raise ValueError(f"batch: {ends[-1]} tokens do not fit into {rows} rows")
        positions = [i for span in spans for i in range(span.start, span.length)]
        slots = [
            span.pages[i // page_size] * page_size + i % page_size
            for span in spans
            for i in range(span.start, span.length)
        ]
        width = max(len(span.pages) for span in spans)
        table = [[*span.pages, *[spare] * (width - len(span.pages))] for span in spans]

        def tensor(values: Sequence, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            tokens=tensor([*chain.from_iterable(span.tokens for span in spans), *[0] * blank]),
            positions=tensor(positions + [0] * blank),
            slots=tensor(slots + [spare * page_size] * blank),
            last=tensor([end - 1 for end in ends]),
            query_starts=tensor([0, *ends], torch.int32),
            lengths=tensor([span.length for span in spans], torch.int32),
            page_table=tensor(table, torch.int32),
            max_query=max(counts),
            max_length=max(span.length for span in spans),
            spans=tuple(spans),
            page_size=page_size,
        )

    @property
    def num_tokens(self) -> int:
        """Rows that belong to sequences; those behind them belong to nobody."""
        return sum(len(span.tokens) for span in self.spans)

    @cached_property
    def reads(self) -> list[slice | Int[Tensor, " pages"]]:
        """Where each sequence's keys and values are: slots in a row, which can be read in place,
        or else its pages. The same for all layers, so it is found once."""
        return [self._read(span) for span in self.spans]

    def _read(self, span: Span) -> slice | Int[Tensor, " pages"]:
        used = span.pages[: -(-span.length // self.page_size)]
        if used == list(range(used[0], used[0] + len(used))):
            start = used[0] * self.page_size
            return slice(start, start + span.length)
        return torch.tensor(used, device=self.tokens.device)

    @cached_property
    def is_in_place(self) -> bool:
        """Whether all sequences can be read without a copy."""
        return all(isinstance(where, slice) for where in self.reads)

    @cached_property
    def key_starts(self) -> Int32[Tensor, " B1"]:
        """The first slot of each sequence, if all can be read in place; if not, its first row in
        what `reads` gives one after another. And one more, which is the end of the latter."""
        if self.is_in_place:
            starts = [where.start for where in self.reads if isinstance(where, slice)] + [0]
        else:
            starts = [0, *accumulate(span.length for span in self.spans)]
        return torch.tensor(starts, dtype=torch.int32).to(self.tokens.device, non_blocking=True)

    @cached_property
    def page_rows(self) -> PageRows:
        """Made of tensors alone, so that this can be part of a graph."""
        B, W = self.page_table.shape
        count = partial(torch.arange, dtype=torch.int32, device=self.page_table.device)
        used = self.lengths.unsqueeze(1) - count(W) * self.page_size
        return PageRows(
            queries=count(B * W + 1),
            starts=pad(self.page_table.flatten() * self.page_size, (0, 1)),
            used=used.clamp(0, self.page_size),
        )
