"""Logits to the next token ids: small pure functions, and `choose`, which composes them per row.

A row's result is the same to the last bit in any company, because two things are never left to
chance: probabilities are added up as integers, whose sum (unlike that of floats) is the same in
any order and shape and on any device; and the random number of a step is a hash of (seed, step).

The order of the stages is vLLM's: bias, penalties, temperature, min-p, top-k, top-p (transformers
differs in one place: min-p comes last). Among equally likely tokens the lowest ids go first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from llama32.settings import Sampling

Scores = Float[Tensor, "*B V"]
Knob = float | Float[Tensor, "*#B 1"]  # one for all rows, or one per row


def apply_bias(logits: Scores, biases: Sequence[Mapping[int, float]]) -> Scores:
    """Adds to each row's logits what its request asks for, token by token."""
    biased = logits.clone()
    for row, bias in enumerate(biases):
        if max(bias, default=0) >= logits.shape[-1]:
            raise ValueError(f"logit_bias: token {max(bias)}, of {logits.shape[-1]} in all")
        tokens = torch.tensor(list(bias), dtype=torch.long, device=logits.device)
        biased[row, tokens] += torch.tensor(list(bias.values()), device=logits.device)
    return biased


def penalize_repetition(logits: Scores, seen: Bool[Tensor, "*B V"], penalty: Knob) -> Scores:
    """Makes seen tokens less likely by a factor on their logits. (CTRL, Keskar et al. 2019)"""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def penalize_presence_frequency(
    logits: Scores, counts: Int[Tensor, "*B V"], presence: Knob, frequency: Knob
) -> Scores:
    """Lowers output tokens once for having occurred and once per occurrence. (OpenAI's formula)"""
    return logits - frequency * counts - presence * (counts > 0)


def scale(logits: Scores, temperature: Knob) -> Scores:
    """Flattens (above 1) or sharpens (below 1) the distribution."""
    return logits / temperature


def likelihood(logits: Scores) -> Scores:
    """Probability relative to the likeliest token's, in fp64."""
    return (logits - logits.amax(-1, keepdim=True)).double().exp()


def countable(probabilities: Scores) -> Int[Tensor, "*B V"]:
    """Probabilities in whole units of 2**-40: int64 has room for the sum of 2**22 tokens."""
    return (probabilities.double() * 2.0**40).long()


def keep_min_p(logits: Scores, min_p: Knob) -> Scores:
    """Keeps tokens at least `min_p` times as likely as the likeliest. (Nguyen et al. 2024)"""
    return logits.where(likelihood(logits) >= min_p, -math.inf)


def keep_top_k(logits: Scores, k: int | Int[Tensor, "*#B 1"]) -> Scores:
    """Keeps exactly the `k` likeliest tokens, without sorting the others."""
    k = torch.as_tensor(k, device=logits.device).clamp(max=logits.shape[-1])
    ranked = logits.topk(int(k.max())).values
    last = ranked.gather(-1, (k - 1).expand(*logits.shape[:-1], 1))
    above, equal = logits > last, logits == last
    room = k - above.sum(-1, keepdim=True)
    return logits.where(above | equal & (equal.cumsum(-1) <= room), -math.inf)


def keep_top_p(logits: Scores, top_p: Knob) -> Scores:
    """Keeps the fewest likeliest tokens that make up `top_p`. (nucleus, Holtzman et al. 2020)"""
    mass = countable(likelihood(logits))
    total = mass.sum(-1, keepdim=True).double()
    # Tokens as small as these make up less than 1 - top_p even together, and zeros sort faster.
    mass = mass.masked_fill(mass * logits.shape[-1] < total * (1 - top_p), 0)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) - ranked < total * top_p
    return logits.where(kept.scatter(-1, order, kept), -math.inf)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on (seed, step) and nothing else."""
    digest = blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def derive_seed(seed: int, i: int) -> int:
    """A seed for the i-th of several samples; the first is the seed itself."""
    if i == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed} sample {i}".encode(), digest_size=8).digest(), "big")


def draw(probabilities: Scores, uniforms: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """The token where the running sum passes the uniform's share of the total.

    Probabilities need not sum to one, but one of them has to be of that order: below 2**-40 they
    count as zero, and a token of probability zero is never drawn.
    """
    reached = countable(probabilities).cumsum(-1)
    total = reached[..., -1:]
    target = (uniforms.double().unsqueeze(-1) * total).long().clamp(max=total - 1)
    return torch.searchsorted(reached, target, right=True).squeeze(-1)


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one chosen token; `top` maps the likeliest ids, likeliest first."""

    chosen: float
    top: dict[int, float]


@dataclass(frozen=True)
class Chosen:
    """One step's tokens, and for the rows that asked their log-probabilities."""

    ids: Int[Tensor, " B"]
    logprobs: list[TokenLogprobs | None]


def choose(
    logits: Float[Tensor, "B V"],
    settings: Sequence[Sampling],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    seeds: Sequence[int],
    allowed: Sequence[bytes | None] = (),
) -> Chosen:
    """The next token of every row, each by its own settings; row i is at step `len(outputs[i])`.

    `allowed` has for each row a bit for every token that may be chosen, the lowest first, or None
    for all.

    Rows that ask for the same stages go through them together, so that a batch of greedy rows is
    one maximum. Raises FloatingPointError where a row holds nan or infinity.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for row, setting in enumerate(settings):
        groups.setdefault(setting.stages, []).append(row)

    limited = only_allowed(logits, allowed)
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for stages, rows in groups.items():
        alike = limited if len(groups) == 1 else limited[rows]
        given = ([of[row] for row in rows] for of in (settings, prompts, outputs, seeds))
        ids[rows] = _choose_alike(stages, alike.float(), *given)

    asked = ((row, s.logprobs) for row, s in enumerate(settings) if s.logprobs is not None)
    logprobs = {row: _logprobs(logits[row], int(ids[row]), n) for row, n in asked}
    return Chosen(ids, [logprobs.get(row) for row in range(len(settings))])


def only_allowed(
    logits: Float[Tensor, "B V"], allowed: Sequence[bytes | None]
) -> Float[Tensor, "B V"]:
    """-inf where a row's bits say no, or do not reach."""
    if not any(allowed):
        return logits
    logits = logits.clone()
    for row, bits in zip(logits, allowed, strict=True):
        if bits is not None:
            packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
            each = (packed.unsqueeze(-1) >> torch.arange(8) & 1).flatten()[: len(row)].bool()
            may = pad(each, (0, len(row) - len(each))).to(row.device)
            row.masked_fill_(~may, -math.inf)
    return logits


def _choose_alike(stages, scores, settings, prompts, outputs, seeds) -> Int[Tensor, " B"]:
    def column(name):
        return torch.tensor([[getattr(s, name)] for s in settings], device=scores.device)

    if "bias" in stages:
        scores = apply_bias(scores, [s.logit_bias for s in settings])
    if "repetition" in stages:
        texts = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
        seen = _counts(texts, scores) > 0
        scores = penalize_repetition(scores, seen, column("repetition_penalty"))
    if "presence_frequency" in stages:
        penalties = column("presence_penalty"), column("frequency_penalty")
        scores = penalize_presence_frequency(scores, _counts(outputs, scores), *penalties)

    best, ids = scores.max(dim=-1)  # of equals the lowest id; nan wins
    if not best.isfinite().all():
        raise FloatingPointError("the model's logits hold nan or infinity: are its weights sound?")
    if "draw" not in stages:
        return ids
    scores = scale(scores, column("temperature"))
    if "min_p" in stages:
        scores = keep_min_p(scores, column("min_p"))
    if "top_k" in stages:
        scores = keep_top_k(scores, column("top_k"))
    if "top_p" in stages:
        scores = keep_top_p(scores, column("top_p"))
    chances = [uniform(seed, len(output)) for seed, output in zip(seeds, outputs, strict=True)]
    uniforms = torch.tensor(chances, dtype=torch.float64, device=scores.device)
    return draw(likelihood(scores), uniforms)


def _counts(texts: Sequence[Sequence[int]], like: Float[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """How often each token occurs in each text."""
    tokens = (torch.tensor(ids, dtype=torch.long, device=like.device) for ids in texts)
    return torch.stack([ids.bincount(minlength=like.shape[-1]) for ids in tokens])


def _logprobs(logits: Float[Tensor, " V"], token: int, n: int) -> TokenLogprobs:
    """Of the model's own distribution, before bias, penalties and temperature (as OpenAI, vLLM)."""
    values = logits.double().log_softmax(dim=-1).float()
    n = min(n, len(values))
    top = keep_top_k(values, max(n, 1)).topk(n)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ranked = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(values[token].item(), dict(ranked))
