"""One step's tensors: the new tokens of several sequences, packed end to end.

Schedulers and loops think in lists; the model thinks in tensors. `Batch.pack` is the one place
where the first become the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int, Int32
from torch import Tensor


class Span(NamedTuple):
    """The next tokens of one sequence, and where its cache is."""

    tokens: Sequence[int]
    start: int  # how many tokens of the sequence are in the cache already
    pages: list[int]  # the sequence's pages in order, with room for `tokens`

    @property
    def length(self) -> int:
        """Tokens in context when this step is done."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """What one forward pass over the paged cache needs to know."""

    tokens: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]  # of each token in its sequence
    slots: Int[Tensor, " N"]  # where its key and value go: page * C + place in the page
    last: Int[Tensor, " B"]  # the row of each sequence's last token, the one to sample from
    # The same for kernels that walk the page table themselves:
    query_starts: Int32[Tensor, " B1"]  # first row of each sequence, then N
    lengths: Int32[Tensor, " B"]  # tokens in context, new ones included
    page_table: Int32[Tensor, "B pages"]  # page ids, 0 where a sequence has no more
    # And for code on the host, which must not wait for the device to tell it:
    spans: tuple[Span, ...]

    @classmethod
    def pack(
        cls, spans: Sequence[Span], page_size: int, device: torch.device | str = "cpu"
    ) -> "Batch":
        """Lists to tensors, built on the host and moved in one go each."""
        counts = torch.tensor([len(span.tokens) for span in spans])
        if not len(spans) or not counts.all():
            raise ValueError("batch: every sequence needs at least one new token")
        ends = counts.cumsum(0)
        lengths = torch.tensor([span.length for span in spans])
        positions = torch.cat([torch.arange(span.start, span.length) for span in spans])
        most = max(len(span.pages) for span in spans)
        table = torch.tensor([[*span.pages] + [0] * (most - len(span.pages)) for span in spans])
        owner = torch.repeat_interleave(torch.arange(len(spans)), counts)
        slots = table[owner, positions // page_size] * page_size + positions % page_size
        return cls(
            tokens=torch.tensor([token for span in spans for token in span.tokens]).to(device),
            positions=positions.to(device),
            slots=slots.to(device),
            last=(ends - 1).to(device),
            query_starts=torch.cat((ends.new_zeros(1), ends)).int().to(device),
            lengths=lengths.int().to(device),
            page_table=table.int().to(device),
            spans=tuple(spans),
        )
