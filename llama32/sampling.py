"""From logits to the next token ids: pure functions, and `sample`, which composes them.

The stages run in vLLM's order: bias, penalties, temperature, min-p, top-k, top-p, then the draw.
(transformers differs in one place: min-p comes last.) Ties go to the lowest token ids.

Sampling is batch-invariant for two reasons. First, probabilities are summed as integers: the bits
of a float sum depend on the order of additions, and the order varies with shape and device; integer
sums are exact. Second, the random number of a step is a hash of (seed, step).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from llama32.sampling_params import Sampling

Scores = Float[Tensor, "*B V"]
PerRow = float | Float[Tensor, "*#B 1"]  # one value for all rows, or one per row


def apply_bias(logits: Scores, biases: Sequence[Mapping[int, float]]) -> Scores:
    """Add the token biases of each request to the request's row."""
    biased, V = logits.clone(), logits.shape[-1]
    for row, bias in enumerate(biases):
        if max(bias, default=0) >= V:
            raise ValueError(f"logit_bias: token id {max(bias)} is outside the vocabulary of {V}")
        tokens = torch.tensor(list(bias), dtype=torch.long, device=logits.device)
        biased[row, tokens] += torch.tensor(list(bias.values()), device=logits.device)
    return biased


def penalize_repetition(logits: Scores, seen: Bool[Tensor, "*B V"], penalty: PerRow) -> Scores:
    """Lower the logits of seen tokens by a factor. (CTRL, Keskar et al. 2019)"""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def penalize_presence_frequency(
    logits: Scores, counts: Int[Tensor, "*B V"], presence: PerRow, frequency: PerRow
) -> Scores:
    """Subtract presence + frequency * count from logits of output tokens. (OpenAI's formula)"""
    return logits - frequency * counts - presence * (counts > 0)


def apply_temperature(logits: Scores, temperature: PerRow) -> Scores:
    """Flatten (above 1) or sharpen (below 1) the distribution."""
    return logits / temperature


def unnormalized_probs(logits: Scores) -> Scores:
    """Return probabilities relative to the likeliest token, in fp64.

    Dividing by a float sum would make the bits depend on the order of additions, and no stage needs
    probabilities that sum to one.
    """
    return (logits - logits.amax(-1, keepdim=True)).double().exp()


def fixed_point(probabilities: Scores) -> Int[Tensor, "*B V"]:
    """Return probabilities in whole units of 2**-40, to be summed without rounding.

    Integer addition is exact, so a sum has the same bits in any order, any batch shape and on any
    device. int64 holds the sum of 2**22 tokens of probability 1.
    """
    return (probabilities.double() * 2.0**40).long()


def keep_min_p(logits: Scores, min_p: PerRow) -> Scores:
    """Keep tokens at least `min_p` times as likely as the likeliest. (Nguyen et al. 2024)"""
    return logits.where(unnormalized_probs(logits) >= min_p, -math.inf)


def keep_top_k(logits: Scores, k: int | Int[Tensor, "*#B 1"]) -> Scores:
    """Keep exactly the `k` likeliest tokens, without sorting the vocabulary."""
    k = torch.as_tensor(k, device=logits.device).clamp(max=logits.shape[-1])
    ranked = logits.topk(int(k.max())).values
    threshold = ranked.gather(-1, (k - 1).expand(*logits.shape[:-1], 1))
    above, equal = logits > threshold, logits == threshold
    room = k - above.sum(-1, keepdim=True)
    return logits.where(above | equal & (equal.cumsum(-1) <= room), -math.inf)


def keep_top_p(logits: Scores, top_p: PerRow) -> Scores:
    """Keep the nucleus: the fewest tokens that together reach `top_p`. (Holtzman et al. 2020)"""
    mass = fixed_point(unnormalized_probs(logits))
    total = mass.sum(-1, keepdim=True).double()
    # Tokens below this bound sum to less than 1 - top_p, so none is kept, and zeros sort faster.
    mass = mass.masked_fill(mass * logits.shape[-1] < total * (1 - top_p), 0)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) - ranked < total * top_p
    return logits.where(kept.scatter(-1, order, kept), -math.inf)


def uniform(seed: int, step: int) -> float:
    """Return a number in [0, 1) with 53 random bits, a function of (seed, step) alone."""
    digest = blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def derive_seed(seed: int, i: int) -> int:
    """Return the seed of the i-th of several samples; sample 0 has `seed` itself."""
    if i == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed} sample {i}".encode(), digest_size=8).digest(), "big")


def sample_categorical(probabilities: Scores, uniforms: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Return the first token at which the cumulative sum exceeds `uniforms` times the total.

    Probabilities need not sum to one, but the largest must be near one: values below 2**-40 count
    as zero, and a token of probability zero is never drawn.
    """
    cumulative = fixed_point(probabilities).cumsum(-1)
    total = cumulative[..., -1:]
    target = (uniforms.double().unsqueeze(-1) * total).long().clamp(max=total - 1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the chosen token and of the `top` token ids, likeliest first."""

    chosen: float
    top: dict[int, float]


@dataclass(frozen=True)
class SamplerOutput:
    """The tokens of one step, with log-probabilities for rows that request them."""

    ids: Int[Tensor, " B"]
    logprobs: list[TokenLogprobs | None]


def sample(
    logits: Float[Tensor, "B V"],
    settings: Sequence[Sampling],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    seeds: Sequence[int],
    allowed: Sequence[bytes | None] = (),
) -> SamplerOutput:
    """Return the next token of every row, sampled with the settings of the row.

    Row i is at step `len(outputs[i])`. `allowed` has one bitmask per row, lowest bit first: bit t
    allows token t, None allows all tokens. Rows with the same stages are processed together, so a
    batch of greedy rows is one argmax. Raises FloatingPointError if a row holds nan or infinity.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for row, setting in enumerate(settings):
        groups.setdefault(setting.stages, []).append(row)

    masked = mask_disallowed(logits, allowed)
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for stages, rows in groups.items():
        scores = masked if len(groups) == 1 else masked[rows]
        columns = ([column[row] for row in rows] for column in (settings, prompts, outputs, seeds))
        ids[rows] = _sample_group(stages, scores.float(), *columns)

    logprobs = [
        None if s.logprobs is None else _logprobs(logits[row], int(ids[row]), s.logprobs)
        for row, s in enumerate(settings)
    ]
    return SamplerOutput(ids, logprobs)


def mask_disallowed(
    logits: Float[Tensor, "B V"], allowed: Sequence[bytes | None]
) -> Float[Tensor, "B V"]:
    """Set logits to -inf for tokens with a bit of 0 or beyond the end of the row's bitmask."""
    if not any(allowed):
        return logits
    logits = logits.clone()
    for row, bitmask in zip(logits, allowed, strict=True):
        if bitmask is not None:
            packed = torch.frombuffer(bytearray(bitmask), dtype=torch.uint8)
            bits = (packed.unsqueeze(-1) >> torch.arange(8) & 1).flatten()[: len(row)].bool()
            is_allowed = pad(bits, (0, len(row) - len(bits))).to(row.device)
            row.masked_fill_(~is_allowed, -math.inf)
    return logits


def _sample_group(stages, scores, settings, prompts, outputs, seeds) -> Int[Tensor, " B"]:
    """Run the stages shared by a group of rows, in the order of the module docstring."""

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

    best, ids = scores.max(dim=-1)  # the lowest id among equal scores; nan propagates
    if not best.isfinite().all():
        raise FloatingPointError("the model's logits hold nan or infinity; check the weights")
    if "draw" not in stages:
        return ids
    scores = apply_temperature(scores, column("temperature"))
    if "min_p" in stages:
        scores = keep_min_p(scores, column("min_p"))
    if "top_k" in stages:
        scores = keep_top_k(scores, column("top_k"))
    if "top_p" in stages:
        scores = keep_top_p(scores, column("top_p"))
    draws = [uniform(seed, len(output)) for seed, output in zip(seeds, outputs, strict=True)]
    uniforms = torch.tensor(draws, dtype=torch.float64, device=scores.device)
    return sample_categorical(unnormalized_probs(scores), uniforms)


def _counts(texts: Sequence[Sequence[int]], like: Float[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """Return how often each token occurs in each text."""
    tokens = (torch.tensor(ids, dtype=torch.long, device=like.device) for ids in texts)
    return torch.stack([ids.bincount(minlength=like.shape[-1]) for ids in tokens])


def _logprobs(logits: Float[Tensor, " V"], token: int, n: int) -> TokenLogprobs:
    """Return log-probabilities of the model itself, before any stage (as OpenAI and vLLM do)."""
    values = logits.double().log_softmax(dim=-1).float()
    n = min(n, len(values))
    top = keep_top_k(values, max(n, 1)).topk(n)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ranked = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(values[token].item(), dict(ranked))
