"""Training batches: rows of running text, or whole documents packed end to end.

Both are a `BatchSource`: `data(step)` yields the batches from a step on. A batch depends only on
the step and the settings, so a resumed run sees the same batches.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

IGNORE_INDEX = -100  # the target of a token without a loss
# Rows that a document may still be added to: 1 to 4% of the room stay empty, as with any larger
# number; with a single open row, 11 to 14% (documents of 100 to 300 tokens, log-normal lengths).
MAX_OPEN_ROWS = 16


class Microbatch(NamedTuple):
    """Tokens of one forward pass, with the target of each token.

    Either rows `(B, T)`, or `(N,)` tokens of whole documents end to end, with `lengths`: no
    document attends to another, and each begins at position 0.
    """

    tokens: Int[Tensor, "*B"]
    targets: Int[Tensor, "*B"]  # the next token, or IGNORE_INDEX
    lengths: tuple[int, ...] | None = None  # of the documents; None for rows

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """Positions of packed documents, from 0 in each document."""
        device = self.tokens.device
        return torch.cat([torch.arange(n, device=device) for n in self.lengths or ()])

    def to(self, device: torch.device) -> "Microbatch":
        """Return a copy on the device."""
        return Microbatch(self.tokens.to(device), self.targets.to(device), self.lengths)


GlobalBatch = list[Microbatch]  # one optimizer step: gradients are added up
BatchSource = Callable[[int], Iterator[GlobalBatch]]  # the batches from a step on


class Example(NamedTuple):
    """A document, and a mask of the tokens that the model learns to generate."""

    ids: list[int]
    loss_mask: list[bool]


def text_batches(
    epochs: Callable[[int], Int[Tensor, " N"]], context: int, batch: int, seed: int = 0
) -> BatchSource:
    """Return batches of `batch` rows, cut from the running text `epochs(i)` of epoch i.

    Each epoch is cut at another offset and shuffled. Neighbouring documents in a row attend to each
    other, as usual in pretraining.
    """

    def steps(first: int) -> Iterator[GlobalBatch]:
        steps_before = 0  # in earlier epochs
        for epoch in count():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            offset = int(torch.randint(context, (), generator=generator))
            rows = split_rows(epochs(epoch), context, offset)
            rows = rows[torch.randperm(len(rows), generator=generator)]
            num_batches = len(rows) // batch
            for i in range(max(0, first - steps_before), num_batches):
                yield [shift(rows[i * batch : (i + 1) * batch])]
            steps_before += num_batches

    return steps


def split_rows(tokens: Int[Tensor, " N"], context: int, offset: int = 0) -> Int[Tensor, "rows T1"]:
    """Return rows of context + 1 tokens. The last target of a row begins the next row."""
    if len(tokens) < offset + context + 1:
        raise ValueError(f"training: {len(tokens)} tokens do not fill a row of {context} + 1")
    return tokens[offset:].unfold(0, context + 1, context)


def shift(rows: Int[Tensor, "*B T1"]) -> Microbatch:
    """Return tokens as inputs and their successors as targets."""
    return Microbatch(rows[..., :-1], rows[..., 1:])


def shuffle_and_concat(documents: Sequence[Sequence[int]], seed: int) -> Int[Tensor, " N"]:
    """Return documents end to end in shuffled order, without padding."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return torch.tensor([token for i in order for token in documents[i]])


def packed_batches(
    examples: Sequence[Example], context: int, batch: int, micro_batch: int = 1, seed: int = 0
) -> BatchSource:
    """Return batches of `batch` rows of up to `context` tokens, each of whole documents.

    `micro_batch` rows pass through the model together. Every epoch shuffles and packs anew. No
    document is lost: a batch may contain rows of two epochs.
    """

    def rows() -> Iterator[list[Example]]:
        return chain.from_iterable(pack_rows(examples, context, seed, epoch) for epoch in count())

    def steps(first: int) -> Iterator[GlobalBatch]:
        rest = islice(rows(), first * batch, None)
        while True:
            drawn = list(islice(rest, batch))
            parts = (drawn[i : i + micro_batch] for i in range(0, batch, micro_batch))
            yield [collate(list(chain.from_iterable(part))) for part in parts]

    return steps


def num_steps(
    examples: Sequence[Example], context: int, batch: int, epochs: int, seed: int = 0
) -> int:
    """Return how many steps of `packed_batches` show every example `epochs` times."""
    if min(batch, epochs) < 1:
        raise ValueError(f"training: batch {batch}, epochs {epochs}; both are 1 or more")
    rows = sum(len(pack_rows(examples, context, seed, epoch)) for epoch in range(epochs))
    return -(-rows // batch)


def pack_rows(
    examples: Sequence[Example], context: int, seed: int, epoch: int
) -> list[list[Example]]:
    """Shuffle documents and put each into the first open row with enough room.

    Raises ValueError if a document is longer than a row.
    """
    order = random.Random(f"{seed} {epoch}").sample(examples, len(examples))
    rows: list[list[Example]] = []
    room: dict[int, int] = {}  # tokens left, by index of an open row
    for example in order:
        length = len(example.ids)
        if length > context:
            raise ValueError(f"training: a document of {length} tokens, a context of {context}")
        row = next((row for row, left in room.items() if length <= left), None)
        if row is None:
            if len(room) == MAX_OPEN_ROWS:
                del room[min(room, key=lambda row: room[row])]
            row = len(rows)
            rows.append([])
            room[row] = context
        rows[row].append(example)
        room[row] -= length
    return rows


def collate(examples: Sequence[Example]) -> Microbatch:
    """Join documents end to end. The last token of each document has no target."""
    tokens = [id for example in examples for id in example.ids]
    targets: list[int] = []
    for ids, loss_mask in examples:
        pairs = zip(ids[1:], loss_mask[1:], strict=True)
        targets += [id if is_target else IGNORE_INDEX for id, is_target in pairs] + [IGNORE_INDEX]
    lengths = tuple(len(example.ids) for example in examples)
    return Microbatch(torch.tensor(tokens), torch.tensor(targets), lengths)
