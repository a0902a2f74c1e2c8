"""Batch invariance: row counts that give every row the same bits.

In a matrix product no row reads another row. Yet the last bits of a row depend on the number of
rows, because libraries choose the order of sums by shape. Rows are therefore padded to a count that
gives the same bits as a canonical count, or split into calls of the canonical count if no other
count does. Libraries do not document these counts, so a probe tests each count once on the model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama32.cache.batch import Span
from llama32.cache.paged_attention import QUERY_TILE, query_tiles
from llama32.kernels.packed_linear import PackedLinear
from llama32.model import Llama
from llama32.rope import rotary_cos_sin


class CallPlanner:
    """Distributes the spans of a step over model calls, each with a row count.

    `candidates(n)` lists row counts for n tokens. The spans share one call, with the first count
    that `agrees` accepts. If no count is accepted, the spans are split into calls of `canonical`
    rows.
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
        """Yield spans, in order, with the row count of their call."""
        if not spans:
            return
        total = sum(len(span.tokens) for span in spans)
        num_rows = next(filter(self.agrees, self.candidates(total)), None)
        if num_rows is not None:
            yield spans, num_rows
            return
        group: list[Span] = []
        room = self.canonical
        for span in chain.from_iterable(map(split_span, spans)):
            if len(span.tokens) > room:
                yield group, self.canonical
                group, room = [], self.canonical
            group.append(span)
            room -= len(span.tokens)
        yield group, self.canonical


def unpadded() -> CallPlanner:
    """Return a planner that adds no padding: one row per token."""
    return CallPlanner(lambda n: [n], canonical=1)


def padded_to(sizes: Sequence[int]) -> CallPlanner:
    """Return a planner that pads to the smallest sufficient size."""
    return CallPlanner(lambda n: [size for size in sizes if size >= n], canonical=sizes[-1])


def padded_to_agreeing(probe: "RowCountProbe") -> CallPlanner:
    """Return a planner that pads to a row count with the canonical bits.

    Above 8 rows, only multiples of 8 are tried, for few probes and little padding. Up to 8
    rows, the exact count is tried first: most libraries treat only a single row differently.
    """

    def candidates(n: int) -> list[int]:
        nearest = [round_up(n, 8)] if n > 8 else [n, round_up(n, 2), round_up(n, 4)]
        return [*nearest, round_up(n, probe.canonical)]

    return CallPlanner(candidates, probe.canonical, probe.agrees)


def plan_rows(
    model: Llama, deterministic: bool | None, sizes: Sequence[int]
) -> tuple[CallPlanner, CallPlanner, bool]:
    """Return planners for prefill and decode, and whether the engine is batch-invariant.

    `sizes`, unless empty, lists the only row counts allowed in decode. Raises ValueError if
    `deterministic` is True and batch invariance is impossible.
    """
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    on_cpu = device.type == "cpu"  # on other devices padding is cheap and splitting expensive
    prefill = RowCountProbe(model, QUERY_TILE if on_cpu else 512, has_head=False)
    decode = RowCountProbe(model, 8 if on_cpu else 64, has_head=True)
    if deterministic is not False:
        is_possible = prefill.agrees(prefill.canonical) and decode.agrees(decode.canonical)
        if deterministic and not is_possible:
            raise ValueError(
                f"deterministic: on {device} in {dtype} the bits of a row depend on its place in "
                f"the batch, so True is not possible; leave it at None or False"
            )
        # None asks for batch invariance only at no cost: if one request needs no padding.
        deterministic = is_possible and (deterministic or decode.agrees(1))
    if not deterministic:
        return unpadded(), padded_to(sizes) if sizes else unpadded(), False
    return (
        padded_to_agreeing(prefill),
        padded_to(sizes[-1:]) if sizes else padded_to_agreeing(decode),
        True,
    )


def split_span(span: Span) -> Iterator[Span]:
    """Split a span at the borders of attention's query tiles."""
    for start, stop in query_tiles(span.start, span.length):
        tokens = span.tokens[start - span.start : stop - span.start]
        yield Span(tokens, start, span.pages)


def round_up(n: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-n // multiple) * multiple


class RowCountProbe:
    """Tests whether a row count gives the bits of the canonical count."""

    def __init__(self, model: Llama, canonical: int, *, has_head: bool) -> None:
        self.canonical = canonical
        self._layers = list({signature(layer): layer for layer in model.layers}.values())
        self._model = model
        self._has_head = has_head
        tested = [*self._layers, model.lm_head] if has_head else self._layers
        leaves = (leaf for module in tested for leaf in module.modules())
        fp32 = [leaf for leaf in leaves if isinstance(leaf, PackedLinear) and leaf.computes_in_fp32]
        self._fp32_leaves = list({signature(leaf): leaf for leaf in fp32}.values())
        self._verdicts: dict[int, bool] = {}

    def agrees(self, rows: int) -> bool:
        """True if `rows` rows get the same bits as in calls of the canonical count."""
        if rows not in self._verdicts:
            self._verdicts[rows] = self._compare(rows)
        return self._verdicts[rows]

    @torch.inference_mode()
    def _compare(self, rows: int) -> bool:
        weight = self._model.norm.weight
        noise = torch.Generator().manual_seed(0)
        shape = round_up(rows, self.canonical), len(weight)
        x = torch.randn(shape, generator=noise).to(weight.device, weight.dtype)
        positions = torch.randint(1000, shape[:1], generator=noise).to(weight.device)
        pieces = zip(x.split(self.canonical), positions.split(self.canonical), strict=True)
        outputs = [self._outputs(*piece) for piece in pieces]
        expected = [torch.cat(results)[:rows] for results in zip(*outputs, strict=True)]
        if rows == self.canonical:  # test whether the place of a row matters
            rolled = self._outputs(x.roll(1, 0), positions.roll(1, 0))
            actual = [result.roll(-1, 0) for result in rolled]
        else:
            actual = self._outputs(x[:rows], positions[:rows])
        return all(map(torch.equal, actual, expected))

    def _outputs(self, x: Float[Tensor, "N E"], positions: Int[Tensor, " N"]) -> list[Tensor]:
        """Return the output of a layer of each kind, and of the LM head if tested."""
        cos_sin = rotary_cos_sin(positions, self._model.inv_freq)
        results = [layer(x, cos_sin, attend_to_self) for layer in self._layers]
        if self._has_head:
            results.append(self._model.lm_head(self._model.norm(x)))
        # Rounding to 16 bits hides most differences between fp32 sums, but not all, so compare the
        # fp32 sums themselves.
        for leaf in self._fp32_leaves:
            width = leaf.shape[1]
            noise = (1.2345678 * x.float()).sin().repeat(1, -(-width // x.shape[-1]))
            results.append(leaf.multiply(noise[:, :width]))
        return results


def attend_to_self(
    q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
) -> Float[Tensor, "N H D"]:
    """Replace attention by a function of q, k and v in which no row reads another row."""
    return q + (k + v).repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)


def signature(module: nn.Module) -> tuple:
    """Return all properties that select a module's kernels: types, shapes, dtypes, not values."""
    modules = tuple((name, type(part), part.extra_repr()) for name, part in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return modules, tuple((name, x.shape, x.dtype, x.device) for name, x in tensors)
