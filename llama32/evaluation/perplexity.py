"""Perplexity and bits per byte of a text.

A text longer than a window is read in overlapping windows; each window predicts the tokens that the
previous window has not seen. A smaller `stride` between windows gives every token more context and
takes longer. Perplexities are comparable only for the same tokenizer, context and stride; bits per
byte are comparable across tokenizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from llama32.llm.llm import LLM
from llama32.model import Llama

DEFAULT_CONTEXT = 2048  # window length of most published Llama perplexities

OnProgress = Callable[[int, int], object]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, and the windows of the measurement."""

    num_tokens: int  # predicted tokens: all but the first
    nats_per_token: float  # mean of -log p
    context: int
    stride: int
    num_bytes: int | None = None  # UTF-8 bytes of the predicted text

    @property
    def perplexity(self) -> float:
        """exp(nats per token): the equivalent number of equally probable tokens."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text if the model compressed the text; None without bytes."""
        if self.num_bytes is None:
            return None
        return self.nats_per_token * self.num_tokens / math.log(2) / self.num_bytes

    @property
    def facts(self) -> dict[str, float | None]:
        """Return all fields and derived values by name."""
        derived = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return derived | asdict(self)

    def __str__(self) -> str:
        per_byte = "" if self.num_bytes is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.perplexity:.3f}, {self.nats_per_token:.4f} nats per token{per_byte} "
            f"({self.num_tokens:,} tokens, context {self.context:,}, stride {self.stride:,})"
        )

    @classmethod
    def of(
        cls,
        model: Llama,
        ids: Sequence[int],
        *,
        context: int | None = None,
        stride: int | None = None,
        num_bytes: int | None = None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> "Perplexity":
        """Measure the perplexity of token ids in the windows of `token_losses`."""
        context, stride = check_windows(model, context, stride)
        losses = token_losses(model, ids, context=context, stride=stride, on_progress=on_progress)
        return cls(len(losses), losses.double().mean().item(), context, stride, num_bytes)


def perplexity(
    llm: LLM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Perplexity:
    """Measure the perplexity of a text in the windows of `token_losses`.

    The text follows the begin-of-text token, which is not predicted. Without a begin-of-text token
    the first token of the text is not predicted, and the bytes of the token do not count.
    """
    tokenizer = llm.require_tokenizer()
    if not text:
        raise ValueError("text: it is empty; there is nothing to predict")
    ids = tokenizer.encode(text, bos=True)
    return Perplexity.of(
        llm.model,
        ids,
        context=context,
        stride=stride,
        num_bytes=len(tokenizer.decode_bytes(ids[1:])),
        on_progress=on_progress,
    )


def token_losses(
    model: Llama,
    ids: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Float[Tensor, " M"]:
    """Return -log p of every token but the first, in nats.

    A window is `context` tokens long, by default the model's context but at most 2,048. The next
    window starts `stride` tokens later, by default half the context. Every token therefore has at
    least `context - stride` tokens of context, or the whole text before the token. The first window
    is computed in several passes from the start: a pass has at most `stride` rows of logits.
    `on_progress(done, total)` counts predicted tokens.
    """
    context, stride = check_windows(model, context, stride)
    check_ids(model, ids)
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    losses = torch.empty(len(ids) - 1, dtype=torch.float32)
    done = 0
    for end in range(context % stride or stride, len(losses) + stride, stride):
        begin, end = max(0, end - context), min(end, len(losses))
        with torch.inference_mode():
            logits = model(tokens[begin:end], logits_at=slice(done - begin, None))  # (stride, V)
            targets = tokens[done + 1 : end + 1]
            losses[done:end] = F.cross_entropy(logits.float(), targets, reduction="none")
        done = end
        on_progress(done, len(losses))
    if not losses.isfinite().all():
        raise FloatingPointError("the model's logits hold nan or infinity: are its weights sound?")
    return losses


def check_windows(model: Llama, context: int | None, stride: int | None) -> tuple[int, int]:
    """Fill in default context and stride; raises ValueError outside the allowed range."""
    limit = model.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, limit) if context is None else context
    if not 1 <= context <= limit:
        raise ValueError(f"context is {context}, allowed: 1 to the model's {limit}")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}, allowed: 1 to the context, {context}")
    return context, stride


def check_ids(model: Llama, ids: Sequence[int]) -> None:
    """Raise ValueError for fewer than two ids, or ids outside the vocabulary."""
    vocabulary = model.config.vocab_size
    if len(ids) < 2:
        raise ValueError(f"ids: {len(ids)} are given; give 2 or more, the first is not predicted")
    if bad := [token for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(f"ids: token id {bad[0]} is outside the vocabulary of {vocabulary}")
