"""The tensors of one forward pass: new tokens of several sequences, packed end to end.

Schedulers and loops work with lists, the model works with tensors. `Batch.pack` is the only place
that converts the lists of a step to tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int, Int32
from torch import Tensor
from torch.nn.functional import pad


class Span(NamedTuple):
    """New tokens of one sequence, and the sequence's pages."""

    tokens: Sequence[int]
    start: int  # tokens of the sequence already in the cache
    pages: list[int]  # in the order of the sequence, with room for `tokens`

    @property
    def length(self) -> int:
        """Tokens in context after the forward pass."""
        return self.start + len(self.tokens)

    def used_pages(self, page_size: int) -> list[int]:
        """Return the pages that hold tokens in context; `pages` may be longer."""
        return self.pages[: -(-self.length // page_size)]


class PagesAsSequences(NamedTuple):
    """Every page of every sequence as a separate sequence with one query.

    Serves kernels without a page table. W is the width of the page table.
    """

    queries: Int32[Tensor, " BW1"]  # 0, 1, 2, ...
    starts: Int32[Tensor, " BW1"]  # first slot of each page, then a last entry that is not read
    used: Int32[Tensor, "B W"]  # slots of the page that hold tokens of the sequence


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass over the paged cache."""

    tokens: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]  # of each token in the token's sequence
    slots: Int[Tensor, " N"]  # for each token's key and value: page * C + offset in the page
    last_tokens: Int[Tensor, " B"]  # the row of each sequence's last token, to sample from
    # For kernels that read a page table:
    query_starts: Int32[Tensor, " B1"]  # first row of each sequence, then the end of the last
    lengths: Int32[Tensor, " B"]  # tokens in context, new tokens included
    page_table: Int32[Tensor, "B pages"]  # page ids, padded with the padding page
    max_query: int  # the largest number of new tokens of a sequence
    max_length: int  # the largest number of tokens in context
    # For code on the host, which must not wait for the device:
    spans: tuple[Span, ...]
    page_size: int

    @classmethod
    def pack(
        cls,
        spans: Sequence[Span],
        page_size: int,
        device: torch.device | str = "cpu",
        *,
        num_rows: int | None = None,
        padding_page: int = 0,
    ) -> "Batch":
        """Convert spans to tensors, each built on the host and copied to the device once.

        `num_rows` sets N. The padding rows after the last sequence write to `padding_page`, and
        nobody reads their results. Raises ValueError if a span is empty or N is too small.
        """
        counts = [len(span.tokens) for span in spans]
        if not counts or 0 in counts:
            raise ValueError("batch: every sequence needs at least one new token")
        ends = list(accumulate(counts))
        num_padding = (num_rows or ends[-1]) - ends[-1]
        if num_padding < 0:
            raise ValueError(f"batch: {ends[-1]} tokens do not fit into {num_rows} rows")
        tokens = [token for span in spans for token in span.tokens]
        positions = [i for span in spans for i in range(span.start, span.length)]
        slots = [
            span.pages[i // page_size] * page_size + i % page_size
            for span in spans
            for i in range(span.start, span.length)
        ]
        width = max(len(span.pages) for span in spans)
        table = [[*span.pages, *[padding_page] * (width - len(span.pages))] for span in spans]

        def tensor(values: Sequence, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            tokens=tensor(tokens + [0] * num_padding),
            positions=tensor(positions + [0] * num_padding),
            slots=tensor(slots + [padding_page * page_size] * num_padding),
            last_tokens=tensor([end - 1 for end in ends]),
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
        """Rows of sequences, without padding rows."""
        return sum(len(span.tokens) for span in self.spans)

    @cached_property
    def kv_locations(self) -> list[slice | Int[Tensor, " pages"]]:
        """The location of each sequence's keys and values, the same for all layers.

        A slice of slots if the pages are adjacent, to be read in place; otherwise the page ids.
        """
        return [self._locate(span) for span in self.spans]

    def _locate(self, span: Span) -> slice | Int[Tensor, " pages"]:
        pages = span.used_pages(self.page_size)
        if pages == list(range(pages[0], pages[0] + len(pages))):
            start = pages[0] * self.page_size
            return slice(start, start + span.length)
        return torch.tensor(pages, device=self.tokens.device)

    @cached_property
    def is_contiguous(self) -> bool:
        """True if all sequences can be read without a copy."""
        return all(isinstance(location, slice) for location in self.kv_locations)

    @cached_property
    def key_starts(self) -> Int32[Tensor, " B1"]:
        """The first key of each sequence, then a last entry, the end of the gathered keys.

        Counts slots of the pool if all sequences can be read in place, otherwise rows of the keys
        gathered sequence after sequence.
        """
        if self.is_contiguous:
            starts = [place.start for place in self.kv_locations if isinstance(place, slice)] + [0]
        else:
            starts = [0, *accumulate(span.length for span in self.spans)]
        return torch.tensor(starts, dtype=torch.int32).to(self.tokens.device, non_blocking=True)

    @cached_property
    def pages_as_sequences(self) -> PagesAsSequences:
        """The pages of all sequences, computed from tensors alone as CUDA graphs need."""
        B, W = self.page_table.shape
        count = partial(torch.arange, dtype=torch.int32, device=self.page_table.device)
        used = self.lengths.unsqueeze(1) - count(W) * self.page_size
        return PagesAsSequences(
            queries=count(B * W + 1),
            starts=pad(self.page_table.flatten() * self.page_size, (0, 1)),
            used=used.clamp(0, self.page_size),
        )
