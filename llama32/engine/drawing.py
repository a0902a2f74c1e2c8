"""From the logits of a step to the next tokens of its requests, whose drafts are verified."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from llama32.engine.request import Request
from llama32.engine.speculation import verified
from llama32.sampling import TokenLogprobs, choose


class Drawn(NamedTuple):
    """A request's next token, or why there is none. With drafts it may get several in a step."""

    request: Request
    id: int
    logprobs: TokenLogprobs | None
    error: FloatingPointError | None = None


def draw(logits: Float[Tensor, "N V"], requests: Sequence[Request]) -> list[Drawn]:
    """Each request's next tokens. Its rows are those of its last known token and of its drafts."""
    rows = [(request, n) for request in requests for n in range(len(request.drafts) + 1)]
    drawn = iter(draw_rows(logits, rows))
    each = ((request.drafts, islice(drawn, len(request.drafts) + 1)) for request in requests)
    return [one for drafts, its in each for one in verified(drafts, list(its))]


def draw_rows(logits: Float[Tensor, "N V"], rows: Sequence[tuple[Request, int]]) -> list[Drawn]:
    """The token after each row, that of a request with so many of its drafts taken for right.
    A row that is not finite is an error of its request alone."""
    if not rows:
        return []
    try:
        chosen = choose(
            logits,
            [request.sampling for request, _ in rows],
            [request.prompt for request, _ in rows],
            [request.output_with(n) for request, n in rows],
            [request.seed for request, _ in rows],
            [request.guide.allowed() if request.guide else None for request, _ in rows],
        )
    except FloatingPointError as error:
        if len(rows) == 1:
            return [Drawn(rows[0][0], -1, None, error)]
        alone = (draw_rows(logits[i : i + 1], [row]) for i, row in enumerate(rows))
        return list(chain.from_iterable(alone))
    found = zip(rows, chosen.ids.tolist(), chosen.logprobs, strict=True)
    return [Drawn(request, id, logprobs) for (request, _), id, logprobs in found]
