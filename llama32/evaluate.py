"""How well a model predicts a text: perplexity, and bits per byte.

A text longer than a window is read in windows that overlap, and each predicts the tokens that the
one before it has not seen. The smaller the `stride` from one to the next, the more of the text
stands before each token, and the longer it takes. A perplexity belongs to its windows: only those
of the same tokenizer, context and stride can be compared. Bits per byte need no same tokenizer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from llama32.llm import LLM
from llama32.model import Llama

USUAL_CONTEXT = 2048  # most published perplexities of Llamas are of windows this long

Report = Callable[[int, int], object]


@dataclass(frozen=True)
class Perplexity:
    """What came of a text, and how it was read."""

    num_tokens: int  # that were predicted: all but the first
    nats_per_token: float  # the mean of -log p
    context: int
    stride: int
    num_bytes: int | None = None  # of the text that was predicted, in UTF-8

    @property
    def perplexity(self) -> float:
        """The choice of a token was as hard as one among this many equally likely ones."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """What a byte of the text would cost, were the model used to compress it."""
        if self.num_bytes is None:
            return None
        return self.nats_per_token * self.num_tokens / math.log(2) / self.num_bytes

    @property
    def facts(self) -> dict[str, float | None]:
        """All of it by name."""
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
        on_progress: Report = lambda done, total: None,
    ) -> "Perplexity":
        """That of token ids, in the windows of `token_losses`."""
        context, stride = windows(model, context, stride)
        losses = token_losses(model, ids, context=context, stride=stride, on_progress=on_progress)
        return cls(len(losses), losses.double().mean().item(), context, stride, num_bytes)


def perplexity(
    llm: LLM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    on_progress: Report = lambda done, total: None,
) -> Perplexity:
    """That of a text, in the windows of `token_losses`.

    The begin-of-text token stands before it and is not predicted. For a checkpoint that has none,
    the first token of the text is what is not predicted, and its bytes do not count.
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
    on_progress: Report = lambda done, total: None,
) -> Float[Tensor, " M"]:
    """-log p of every token but the first, in nats.

    A window is `context` tokens long, by default 2,048 or the model's context if that is less, and
    the next one begins `stride` tokens further on, by default half of that. So a token has at least
    `context - stride` tokens before it, or all there are. The first window is read in steps, each
    from the start, so that there are never more than `stride` rows of logits.
    `on_progress(done, total)` counts the tokens predicted.
    """
    context, stride = windows(model, context, stride)
    check_ids(model, ids)
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    losses = torch.empty(len(ids) - 1)
    done = 0
    for end in range(context % stride or stride, len(losses) + stride, stride):
        begin, end = max(0, end - context), min(end, len(losses))
        with torch.inference_mode():
            logits = model(tokens[begin:end], rows=slice(done - begin, None))  # (stride, V)
            targets = tokens[done + 1 : end + 1]
            losses[done:end] = F.cross_entropy(logits.float(), targets, reduction="none")
        done = end
        on_progress(done, len(losses))
    if not losses.isfinite().all():
        raise FloatingPointError("the model's logits hold nan or infinity: are its weights sound?")
    return losses


def windows(model: Llama, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride, as given or by default. ValueError where they cannot be."""
    limit = model.config.max_position_embeddings
    context = min(USUAL_CONTEXT, limit) if context is None else context
    if not 1 <= context <= limit:
        raise ValueError(f"context is {context}, allowed: 1 to the model's {limit}")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}, allowed: 1 to the context, {context}")
    return context, stride


def check_ids(model: Llama, ids: Sequence[int]) -> None:
    """ValueError where nothing can be predicted, or an id is none of the model's."""
    vocabulary = model.config.vocab_size
    if len(ids) < 2:
        raise ValueError(f"ids: {len(ids)} are given; give 2 or more, the first is not predicted")
    if bad := [token for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(f"ids: token id {bad[0]} is outside the vocabulary of {vocabulary}")
