"""What is trained on: rows of running text, or whole documents packed end to end.

Either way a run asks for `data(step)`: the steps from that one on. A step depends on its number and
the recipe alone, so a run that was resumed goes through the same ones.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

IGNORED = -100  # a target that nothing is learned from
# That a document may still go into: 1 to 4% of the room stay empty, as with any larger number; with
# a single one it would be 11 to 14% (documents of 100 to 300 tokens, and log-normal lengths).
OPEN_ROWS = 16


class Microbatch(NamedTuple):
    """What goes through the model at once, and what each token's successor should be.

    Either rows `(B, T)`, or the `(N,)` tokens of whole documents end to end, with their lengths:
    none of them sees another, and each begins at position 0.
    """

    tokens: Int[Tensor, "*B"]
    targets: Int[Tensor, "*B"]  # IGNORED where nothing is asked
    lengths: tuple[int, ...] | None = None

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """Of packed documents, each counted from 0."""
        device = self.tokens.device
        return torch.cat([torch.arange(n, device=device) for n in self.lengths or ()])

    def to(self, device: torch.device) -> "Microbatch":
        """The same, there."""
        return Microbatch(self.tokens.to(device), self.targets.to(device), self.lengths)


Step = list[Microbatch]  # their gradients are added up
Data = Callable[[int], Iterator[Step]]


class Example(NamedTuple):
    """A document, and which of its tokens the model is to learn to say."""

    ids: list[int]
    learned: list[bool]


def text_rows(
    epochs: Callable[[int], Int[Tensor, " N"]], context: int, batch: int, seed: int = 0
) -> Data:
    """Steps of `batch` rows, cut out of one long row of text. `epochs(i)` gives that of epoch i.

    Each epoch is cut at another offset and shuffled. What lies side by side in the text sees each
    other: that is for pretraining.
    """

    def steps(first: int) -> Iterator[Step]:
        passed = 0
        for epoch in count():
            draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            offset = int(torch.randint(context, (), generator=draw))
            rows = cut(epochs(epoch), context, offset)
            rows = rows[torch.randperm(len(rows), generator=draw)]
            whole = len(rows) // batch
            for i in range(max(0, first - passed), whole):
                yield [predicting(rows[i * batch : (i + 1) * batch])]
            passed += whole

    return steps


def cut(tokens: Int[Tensor, " N"], context: int, offset: int = 0) -> Int[Tensor, "rows T1"]:
    """Rows of context + 1 tokens that overlap by one: the last target is the next row's start."""
    if len(tokens) < offset + context + 1:
        raise ValueError(f"training: {len(tokens)} tokens do not fill a row of {context} + 1")
    return tokens[offset:].unfold(0, context + 1, context)


def predicting(rows: Int[Tensor, "*B T1"]) -> Microbatch:
    """Rows of which each token is to be predicted by those before it."""
    return Microbatch(rows[..., :-1], rows[..., 1:])


def shuffled(documents: Sequence[Sequence[int]], seed: int) -> Int[Tensor, " N"]:
    """Documents in shuffled order, end to end: no padding, every token is trained on."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return torch.tensor([token for i in order for token in documents[i]])


def packed(
    examples: Sequence[Example], context: int, batch: int, at_once: int = 1, seed: int = 0
) -> Data:
    """Steps of `batch` rows of up to `context` tokens, each of whole documents. `at_once` of them
    go through the model together. Every epoch shuffles and packs anew, and loses nothing: a step
    may reach from one into the next."""

    def rows() -> Iterator[list[Example]]:
        return chain.from_iterable(fill(examples, context, seed, epoch) for epoch in count())

    def steps(first: int) -> Iterator[Step]:
        left = islice(rows(), first * batch, None)
        while True:
            step = list(islice(left, batch))
            parts = (step[i : i + at_once] for i in range(0, batch, at_once))
            yield [together(list(chain.from_iterable(part))) for part in parts]

    return steps


def num_steps(
    examples: Sequence[Example], context: int, batch: int, epochs: int, seed: int = 0
) -> int:
    """How many steps of `packed` bring every example `epochs` times."""
    if min(batch, epochs) < 1:
        raise ValueError(f"training: batch {batch}, epochs {epochs}; both are 1 or more")
    rows = sum(len(fill(examples, context, seed, epoch)) for epoch in range(epochs))
    return -(-rows // batch)


def fill(examples: Sequence[Example], context: int, seed: int, epoch: int) -> list[list[Example]]:
    """Rows of whole documents, in shuffled order, each into the first that has room for it."""
    order = random.Random(f"{seed} {epoch}").sample(examples, len(examples))
    rows: list[list[Example]] = []
    room: dict[int, int] = {}  # of those that are still open
    for example in order:
        length = len(example.ids)
        if length > context:
            raise ValueError(f"training: a document of {length} tokens, a context of {context}")
        fitting = next((row for row, left in room.items() if length <= left), None)
        if fitting is None:
            if len(room) == OPEN_ROWS:
                del room[min(room, key=lambda row: room[row])]
            fitting = len(rows)
            rows.append([])
            room[fitting] = context
        rows[fitting].append(example)
        room[fitting] -= length
    return rows


def together(examples: Sequence[Example]) -> Microbatch:
    """Documents end to end, each predicted by itself alone."""
    tokens = [id for example in examples for id in example.ids]
    targets: list[int] = []
    for ids, learned in examples:
        pairs = zip(ids[1:], learned[1:], strict=True)
        targets += [id if wanted else IGNORED for id, wanted in pairs] + [IGNORED]
    lengths = tuple(len(example.ids) for example in examples)
    return Microbatch(torch.tensor(tokens), torch.tensor(targets), lengths)
