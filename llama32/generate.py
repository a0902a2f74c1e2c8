"""The minimal loop: prefill, then decode token by token, on the paged cache.

One sequence at a time and ids only: text, stop strings and chat are the caller's. The engine does
the same for many sequences at once, and is tested against this.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from secrets import randbits
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llama32.batch import Batch, Span
from llama32.cache import PAGE_SIZE, PagedCache
from llama32.config import LlamaConfig
from llama32.model import Llama
from llama32.sampling import TokenLogprobs, choose
from llama32.settings import Sampling

PREFILL_CHUNK = 512  # tokens per step: enough to keep matrix products busy, little to hold


class Token(NamedTuple):
    """A generated token. The last one says why it is: "stop" or "length"."""

    id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


def generate(
    model: Llama,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    eos_ids: Collection[int] = (),
    cache: PagedCache | None = None,
    chunk: int = PREFILL_CHUNK,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Iterator[Token]:
    """Continue `prompt` until a stop id, `max_new_tokens` or the end of the context.

    The prompt goes through in chunks, so the memory of a step does not grow with its length.
    `on_prefill(done, total)` is told after each. A stop id is yielded too, as the last token.
    Raises ValueError at once where the prompt is empty, out of range or too long.
    """
    longest = check_prompt(model.config, prompt, sampling)
    if cache is None:
        weight = model.norm.weight
        num_pages = -(-longest // PAGE_SIZE)
        cache = PagedCache(model.config, num_pages, dtype=weight.dtype, device=weight.device)
    stop_ids = set(sampling.stop_ids) | (set() if sampling.ignore_eos else set(eos_ids))
    return _tokens(model, prompt, sampling, stop_ids, longest, cache, chunk, on_prefill)


def _tokens(
    model: Llama,
    prompt: Sequence[int],
    sampling: Sampling,
    stop_ids: set[int],
    longest: int,
    cache: PagedCache,
    chunk: int,
    on_prefill: Callable[[int, int], None] | None,
) -> Iterator[Token]:
    seed = randbits(64) if sampling.seed is None else sampling.seed
    pages: list[int] = []
    output: list[int] = []
    try:
        for start in range(0, len(prompt), chunk):
            logits = step(model, cache, Span(prompt[start : start + chunk], start, pages))
            if on_prefill is not None:
                on_prefill(min(start + chunk, len(prompt)), len(prompt))
        while True:
            chosen = choose(logits, [sampling], [prompt], [output], [seed])
            token = int(chosen.ids[0])
            output.append(token)
            length = len(prompt) + len(output)
            reason = "stop" if token in stop_ids else "length" if length >= longest else None
            yield Token(token, chosen.logprobs[0], reason)
            if reason is not None:
                return
            logits = step(model, cache, Span([token], length - 1, pages))
    finally:  # also when the caller stops listening
        cache.release(pages)


@torch.inference_mode()
def step(model: Llama, cache: PagedCache, span: Span) -> Float[Tensor, "1 V"]:
    """One forward pass over new tokens: their keys and values into the cache, the logits after
    the last of them out. `span.pages` grows as needed."""
    cache.grow(span.pages, span.length)
    batch = Batch.pack([span], cache.page_size, cache.keys.device)
    return model(batch.tokens, batch.positions, cache.attends(batch), rows=batch.last)


def check_prompt(config: LlamaConfig, prompt: Sequence[int], sampling: Sampling) -> int:
    """The most tokens that prompt and output can come to; ValueError if it cannot be run."""
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    if not len(prompt):
        raise ValueError("prompt: it is empty; give at least one token")
    if bad := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"prompt: token id {bad[0]} is outside the vocabulary of {vocabulary}")
    if len(prompt) >= context:
        raise ValueError(
            f"prompt: its {len(prompt)} tokens leave no room for an answer in the model's context "
            f"of {context}; shorten it"
        )
    return min(len(prompt) + sampling.max_new_tokens, context)
