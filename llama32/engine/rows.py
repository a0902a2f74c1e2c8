"""How many rows to run together, so that each gets the same bits in any company.

In a matrix product no row reads another. Yet its last bits depend on how many there are: with the
shape a library changes the order of its sums. So rows are padded to counts that are known to give
the bits of one canonical count, and split up where there is no such count. Which do is no matter
of documentation; it is tried on the model itself, and remembered.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama32.adapt.packed import PackedLinear
from llama32.batch import Span
from llama32.model import Llama
from llama32.paged import QUERY_BLOCK, blocks
from llama32.rope import rotation


class Rows:
    """Cuts the spans of a step into calls, each with its row count.

    That is the first of `candidates(n)` which `agrees` accepts; where there is none, calls of
    `canonical` rows follow each other.
    """

    def __init__(
        self,
        candidates: Callable[[int], Iterable[int]],
        canonical: int,
        agrees: Callable[[int], bool] = lambda rows: True,
    ) -> None:
        self.candidates = candidates
        self.canonical = canonical
        self.agrees = agrees

    def calls(self, spans: Sequence[Span]) -> Iterator[tuple[Sequence[Span], int]]:
        """Spans, in order, and the rows to run them in."""
        if not spans:
            return
        total = sum(len(span.tokens) for span in spans)
        rows = next(filter(self.agrees, self.candidates(total)), None)
        if rows is not None:
            yield spans, rows
            return
        group: list[Span] = []
        room = self.canonical
        for span in chain.from_iterable(map(split, spans)):
            if len(span.tokens) > room:
                yield group, self.canonical
                group, room = [], self.canonical
            group.append(span)
            room -= len(span.tokens)
        yield group, self.canonical


def free() -> Rows:
    """As many rows as there are tokens."""
    return Rows(lambda n: [n], canonical=1)


def fixed(sizes: Sequence[int]) -> Rows:
    """The smallest of a few sizes."""
    return Rows(lambda n: [size for size in sizes if size >= n], canonical=sizes[-1])


def proven(probe: "Probe") -> Rows:
    """Any count that gives the canonical bits. Of those above 8 only every eighth is tried: few
    tries, and next to no padding. A few rows that do not have them are padded to as few as do:
    most often it is only a lone row that a library takes another way."""

    def candidates(n: int) -> list[int]:
        near = [round_up(n, 8)] if n > 8 else [n, round_up(n, 2), round_up(n, 4)]
        return [*near, round_up(n, probe.canonical)]

    return Rows(candidates, probe.canonical, probe.agrees)


def rows_of(
    model: Llama, deterministic: bool | None, sizes: Sequence[int]
) -> tuple[Rows, Rows, bool]:
    """For the prompts of a step, for its decoding, and whether they make it deterministic.

    `sizes` are those that decoding is limited to, if any. ValueError where determinism is asked
    for and cannot be had.
    """
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    on_cpu = device.type == "cpu"  # elsewhere padding costs little, and splitting much
    prompts = Probe(model, QUERY_BLOCK if on_cpu else 512, has_head=False)
    decode = Probe(model, 8 if on_cpu else 64, has_head=True)
    if deterministic is not False:
        is_possible = prompts.agrees(prompts.canonical) and decode.agrees(decode.canonical)
        if deterministic and not is_possible:
            raise ValueError(
                f"deterministic: on {device} in {dtype} the bits of a row depend on its place"
            )
        # Free means: a lone request needs no padding.
        deterministic = is_possible and (deterministic or decode.agrees(1))
    if not deterministic:
        return free(), fixed(sizes) if sizes else free(), False
    return proven(prompts), fixed(sizes[-1:]) if sizes else proven(decode), True


def split(span: Span) -> Iterator[Span]:
    """The blocks that attention would cut it into anyhow."""
    for start, stop in blocks(span.start, span.length):
        tokens = span.tokens[start - span.start : stop - span.start]
        yield Span(tokens, start, span.pages)


def round_up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


class Probe:
    """Tries whether a row count gives the bits of the canonical one."""

    def __init__(self, model: Llama, canonical: int, *, has_head: bool) -> None:
        self.canonical = canonical
        self._parts = list({signature(layer): layer for layer in model.layers}.values())
        self._model = model
        self._has_head = has_head
        whole = [*self._parts, model.lm_head] if has_head else self._parts
        leaves = (leaf for part in whole for leaf in part.modules())
        wide = [leaf for leaf in leaves if isinstance(leaf, PackedLinear) and leaf.in_fp32]
        self._wide = list({signature(leaf): leaf for leaf in wide}.values())
        self._known: dict[int, bool] = {}

    def agrees(self, rows: int) -> bool:
        """Whether each of `rows` rows has the bits that it would have among the canonical."""
        if rows not in self._known:
            self._known[rows] = self._try(rows)
        return self._known[rows]

    @torch.inference_mode()
    def _try(self, rows: int) -> bool:
        weight = self._model.norm.weight
        noise = torch.Generator().manual_seed(0)
        shape = round_up(rows, self.canonical), len(weight)
        x = torch.randn(shape, generator=noise).to(weight.device, weight.dtype)
        positions = torch.randint(1000, shape[:1], generator=noise).to(weight.device)
        cut = zip(x.split(self.canonical), positions.split(self.canonical), strict=True)
        parts = [self._results(*part) for part in cut]
        expected = [torch.cat(results)[:rows] for results in zip(*parts, strict=True)]
        if rows == self.canonical:  # then: whether the place among them matters
            rolled = self._results(x.roll(1, 0), positions.roll(1, 0))
            found = [result.roll(-1, 0) for result in rolled]
        else:
            found = self._results(x[:rows], positions[:rows])
        return all(map(torch.equal, found, expected))

    def _results(self, x: Float[Tensor, "N E"], positions: Int[Tensor, " N"]) -> list[Tensor]:
        """What a layer of each kind makes of these rows, and the unembedding."""
        by = rotation(positions, self._model.rotary_speeds)
        results = [layer(x, by, attend_to_self) for layer in self._parts]
        if self._has_head:
            results.append(self._model.lm_head(self._model.norm(x)))
        # Sums in fp32 that are rounded to 16 bits seldom show a last bit, but then they do.
        for leaf in self._wide:
            width = leaf.shape[1]
            noise = (1.2345678 * x.float()).sin().repeat(1, -(-width // x.shape[-1]))
            results.append(leaf.multiply(noise[:, :width]))
        return results


def attend_to_self(
    q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
) -> Float[Tensor, "N H D"]:
    """In the place of attention: something of all three, and no row reads another."""
    return q + (k + v).repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)


def signature(module: nn.Module) -> tuple:
    """What decides how a module computes: its parts, their shapes and dtypes, not their values."""
    parts = tuple((name, type(part), part.extra_repr()) for name, part in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, x.shape, x.dtype, x.device) for name, x in tensors)
