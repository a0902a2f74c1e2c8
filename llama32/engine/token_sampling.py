"""Sampling of the next tokens from the logits of a step, with verification of drafts."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from llama32.engine.request import Request
from llama32.engine.speculation import accept
from llama32.sampling import TokenLogprobs, sample


class SampledToken(NamedTuple):
    """A token sampled for a request, or the error that ends the request.

    With drafts, a request can get several tokens in a step.
    """

    request: Request
    id: int
    logprobs: TokenLogprobs | None
    error: FloatingPointError | None = None


def sample_next_tokens(
    logits: Float[Tensor, "N V"], requests: Sequence[Request]
) -> list[SampledToken]:
    """Sample the next tokens of each request, and verify drafts.

    The rows of a request are the row of its last known token, then a row for each draft.
    """
    rows = [(request, n) for request in requests for n in range(len(request.drafts) + 1)]
    sampled = iter(sample_rows(logits, rows))
    by_request = (
        (request.drafts, islice(sampled, len(request.drafts) + 1)) for request in requests
    )
    return [token for drafts, tokens in by_request for token in accept(drafts, list(tokens))]


def sample_rows(
    logits: Float[Tensor, "N V"], rows: Sequence[tuple[Request, int]]
) -> list[SampledToken]:
    """Sample the token after each row: a request, and the number of its drafts up to the row.

    The drafts up to the row count as output. A row that is not finite gives an error to its own
    request only.
    """
    if not rows:
        return []
    try:
        chosen = sample(
            logits,
            [request.sampling for request, _ in rows],
            [request.prompt for request, _ in rows],
            [request.output_with(num_drafts) for request, num_drafts in rows],
            [request.seed for request, _ in rows],
            [request.matcher.allowed() if request.matcher else None for request, _ in rows],
        )
    except FloatingPointError as error:
        if len(rows) == 1:
            return [SampledToken(rows[0][0], -1, None, error)]
        row_by_row = (sample_rows(logits[i : i + 1], [row]) for i, row in enumerate(rows))
        return list(chain.from_iterable(row_by_row))
    results = zip(rows, chosen.ids.tolist(), chosen.logprobs, strict=True)
    return [SampledToken(request, id, logprobs) for (request, _), id, logprobs in results]
