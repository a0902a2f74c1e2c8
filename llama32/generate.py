"""The minimal generation loop: prefill, then decode token by token, on the paged cache.

One sequence at a time, and token ids only: the caller handles text, stop strings and chat. The
engine generates many sequences at once and is tested against this loop.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from secrets import randbits
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llama32.cache.batch import Batch, Span
from llama32.cache.kv_cache import PAGE_SIZE, PagedCache
from llama32.config import LlamaConfig
from llama32.model import Llama
from llama32.sampling import TokenLogprobs, sample
from llama32.sampling_params import Sampling

PREFILL_CHUNK = 512  # tokens per step: large enough for efficient matrix products, small in memory


class Token(NamedTuple):
    """A generated token; the last token has a finish reason, "stop" or "length"."""

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

    Prefill runs in chunks, so the memory of a step does not grow with the prompt, and calls
    `on_prefill(done, total)` after every chunk. A stop id is yielded as the last token. Raises
    ValueError at the call, not at the first token, if the prompt is empty, too long or has an
    unknown token id.
    """
    max_length = check_prompt(model.config, prompt, sampling)
    if cache is None:
        weight = model.norm.weight
        num_pages = -(-max_length // PAGE_SIZE)
        cache = PagedCache(model.config, num_pages, dtype=weight.dtype, device=weight.device)
    stop_ids = set(sampling.stop_ids) | (set() if sampling.ignore_eos else set(eos_ids))
    return _tokens(model, prompt, sampling, stop_ids, max_length, cache, chunk, on_prefill)


def _tokens(
    model: Llama,
    prompt: Sequence[int],
    sampling: Sampling,
    stop_ids: set[int],
    max_length: int,
    cache: PagedCache,
    chunk: int,
    on_prefill: Callable[[int, int], None] | None,
) -> Iterator[Token]:
    seed = randbits(64) if sampling.seed is None else sampling.seed
    pages: list[int] = []
    output: list[int] = []
    try:
        for start in range(0, len(prompt), chunk):
            logits = forward(model, cache, Span(prompt[start : start + chunk], start, pages))
            if on_prefill is not None:
                on_prefill(min(start + chunk, len(prompt)), len(prompt))
        while True:
            sampled = sample(logits, [sampling], [prompt], [output], [seed])
            token = int(sampled.ids[0])
            output.append(token)
            length = len(prompt) + len(output)
            reason = "stop" if token in stop_ids else "length" if length >= max_length else None
            yield Token(token, sampled.logprobs[0], reason)
            if reason is not None:
                return
            logits = forward(model, cache, Span([token], length - 1, pages))
    finally:  # also runs when the caller closes the iterator early
        cache.release(pages)


@torch.inference_mode()
def forward(model: Llama, cache: PagedCache, span: Span) -> Float[Tensor, "1 V"]:
    """Write the keys and values of new tokens to the cache; return the logits after the last.

    Appends free pages to `span.pages` as needed.
    """
    cache.grow(span.pages, span.length)
    batch = Batch.pack([span], cache.page_size, cache.keys.device)
    return model(
        batch.tokens, batch.positions, cache.attention_fns(batch), logits_at=batch.last_tokens
    )


def check_prompt(config: LlamaConfig, prompt: Sequence[int], sampling: Sampling) -> int:
    """Return the maximum length of prompt and output; ValueError if the prompt cannot run."""
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    if not len(prompt):
        raise ValueError("prompt: it is empty; give at least one token")
    if unknown := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"prompt: token id {unknown[0]} is outside the vocabulary of {vocabulary}")
    if len(prompt) >= context:
        raise ValueError(
            f"prompt: its {len(prompt)} tokens leave no room for an answer in the model's context "
            f"of {context}; shorten it"
        )
    return min(len(prompt) + sampling.max_new_tokens, context)
