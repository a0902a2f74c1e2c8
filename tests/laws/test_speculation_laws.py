"""Drafts do not change the distribution: over many seeds, outputs are as frequent as the model's
softmax says, even if the draft model disagrees."""

from collections import Counter
from itertools import product

import pytest
import torch

from llama32.engine.draft_model import DraftModel
from llama32.engine.engine import Engine
from llama32.engine.prompt_lookup import PromptLookup
from llama32.engine.settings import EngineSettings, Speculation
from llama32.engine.stats import Stats
from llama32.model import Llama
from llama32.sampling_params import Sampling
from tests.chance import chi_square
from tests.checkpoints import random_model, tiny_config

VOCABULARY = 6
PROMPT = [3, 1, 4, 1, 5, 2]
LENGTH = 3
NUM_SEEDS = 2500

Text = tuple[int, ...]


def make_model(seed: int) -> Llama:
    return random_model(tiny_config(vocab_size=VOCABULARY, eos_token_ids=()), seed)


@pytest.fixture(scope="module")
def model() -> Llama:
    return make_model(seed=0)


@torch.no_grad()
def probabilities(model: Llama, temperature: float) -> dict[Text, float]:
    """Return the probability of every continuation, token by token without a cache."""
    known: dict[Text, float] = {(): 1.0}
    for _ in range(LENGTH):
        tokens = torch.tensor([[*PROMPT, *text] for text in known])
        chances = (model(tokens)[:, -1] / temperature).softmax(-1)
        known = {
            (*text, token): p * chance
            for (text, p), row in zip(known.items(), chances.tolist(), strict=True)
            for token, chance in enumerate(row)
        }
    return known


def said(model: Llama, speculation: Speculation, temperature: float) -> tuple[Counter[Text], Stats]:
    settings = EngineSettings(cache_tokens=64 * 80, speculation=speculation)
    engine = Engine.of(model, settings)
    requests = [
        engine.add(PROMPT, Sampling(temperature=temperature, seed=seed, max_new_tokens=LENGTH))
        for seed in range(NUM_SEEDS)
    ]
    while engine.is_busy:
        engine.step()
    return Counter(tuple(request.output) for request in requests), engine.stats


@pytest.mark.parametrize(
    ("speculation", "temperature"),
    [
        (DraftModel(make_model(seed=1)), 1.0),
        (DraftModel(make_model(seed=1)), 0.6),
        (PromptLookup(min_ngram=1), 1.0),
    ],
)
def test_continuations_are_as_frequent_as_the_model_has_them(model, speculation, temperature):
    expected = probabilities(model, temperature)
    found, stats = said(model, speculation, temperature)
    assert len(expected) == VOCABULARY**LENGTH
    assert {*found} <= {*product(range(VOCABULARY), repeat=LENGTH)}
    # The chi-square test needs a few of each: rarer texts are counted together.
    common = [text for text, p in expected.items() if p * NUM_SEEDS >= 5]
    assert len(common) > 20
    chances = [expected[text] for text in common]
    counts = [found[text] for text in common]
    chances.append(1 - sum(chances))
    counts.append(NUM_SEEDS - sum(counts))
    assert chi_square(torch.tensor(counts), torch.tensor(chances)) < 3
    assert stats.accepted > NUM_SEEDS / 10
    assert stats.acceptance_rate < 0.8
