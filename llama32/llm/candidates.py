"""Several continuations of a prompt: seeds and ranking."""

import dataclasses
from collections.abc import Sequence

from llama32.llm.result import Result
from llama32.sampling import derive_seed
from llama32.sampling_params import Sampling


def candidate_settings(settings: Sampling, count: int, *, ranked: bool) -> list[Sampling]:
    """Return the sampling settings of `count` candidates.

    A seed in `settings` goes to the first candidate; the rest get derived seeds. Ranked candidates
    record log-probabilities.
    """
    if ranked:
        settings = dataclasses.replace(settings, logprobs=settings.logprobs or 0)
    if settings.seed is None:
        return [settings] * count
    seeds = [derive_seed(settings.seed, i) for i in range(count)]
    return [dataclasses.replace(settings, seed=seed) for seed in seeds]


def most_likely(results: Sequence[Result], n: int) -> list[Result]:
    """Return the `n` results of the highest mean log-probability, highest first."""
    return sorted(results, key=mean_logprob, reverse=True)[:n]


def mean_logprob(result: Result) -> float:
    """Return the mean log-probability per token."""
    logprobs = result.logprobs or []
    return sum(token.chosen for token in logprobs) / max(len(logprobs), 1)
