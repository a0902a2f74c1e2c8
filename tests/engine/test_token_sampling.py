"""Sampling of next tokens: drafts, and rows that are not finite."""

import math

import pytest
import torch

from llama32.engine.request import Request
from llama32.engine.token_sampling import sample_next_tokens
from llama32.sampling_params import Sampling

VOCABULARY = 160


def make_request(seed: int = 0) -> Request:
    sampling = Sampling(temperature=0, logprobs=VOCABULARY)
    return Request(prompt=[seed, 5, 7], max_length=50, sampling=sampling)


def test_each_row_is_drawn_as_the_output_would_be_there():
    """At the row's own step number, with earlier drafts included in penalties."""
    logits = torch.zeros(4, VOCABULARY)
    sampling = Sampling(
        seed=3, presence_penalty=100, logit_bias={i: -100 for i in range(8, VOCABULARY)}
    )
    request = Request(prompt=[1], max_length=50, sampling=sampling, seed=3)
    expected = []
    for i in range(4):
        (sampled,) = sample_next_tokens(logits[i : i + 1], [request])
        expected.append(sampled.id)
        request.output.append(sampled.id)
    assert len(set(expected)) == 4
    request.output.clear()
    request.drafts = expected[:3]
    assert [sampled.id for sampled in sample_next_tokens(logits, [request])] == expected


def test_a_row_that_is_not_finite_is_no_error_behind_a_wrong_draft():
    request, other = make_request(), make_request(1)
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    first, second = logits[:2].argmax(-1).tolist()
    logits[2, 0] = math.nan
    request.drafts = [first, (second + 1) % VOCABULARY, 5]
    tokens = sample_next_tokens(logits, [request, other])
    assert [(sampled.request, sampled.error) for sampled in tokens] == [(request, None)] * 2 + [
        (other, None)
    ]
    request.drafts = [first, second, 5]
    errors = [sampled.error is not None for sampled in sample_next_tokens(logits, [request, other])]
    assert errors == [False, False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_each_row_that_is_not_finite_is_told_apart(bad):
    requests = [make_request(i) for i in range(5)]
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    sound = sample_next_tokens(logits, requests)
    logits[1, 7] = logits[4, 0] = bad
    tokens = sample_next_tokens(logits, requests)
    assert [sampled.request for sampled in tokens] == requests
    assert [sampled.error is not None for sampled in tokens] == [False, True, False, False, True]
    assert [tokens[i] for i in (0, 2, 3)] == [sound[i] for i in (0, 2, 3)]


def test_of_nobody_nothing_is_drawn():
    assert sample_next_tokens(torch.randn(0, VOCABULARY), []) == []
