"""The next token of each request, and what becomes of drafts and of rows that are not finite."""

import math

import pytest
import torch

from llama32.engine.drawing import draw
from llama32.engine.request import Request
from llama32.settings import Sampling

VOCABULARY = 160


def make_request(seed: int = 0) -> Request:
    sampling = Sampling(temperature=0, logprobs=VOCABULARY)
    return Request(prompt=[seed, 5, 7], longest=50, sampling=sampling)


def test_each_row_is_drawn_as_the_output_would_be_there():
    """At its own step, and with the drafts before it among what penalties count."""
    logits = torch.zeros(4, VOCABULARY)
    sampling = Sampling(
        seed=3, presence_penalty=100, logit_bias={i: -100 for i in range(8, VOCABULARY)}
    )
    request = Request(prompt=[1], longest=50, sampling=sampling, seed=3)
    expected = []
    for i in range(4):
        (one,) = draw(logits[i : i + 1], [request])
        expected.append(one.id)
        request.output.append(one.id)
    assert len(set(expected)) == 4
    request.output.clear()
    request.drafts = expected[:3]
    assert [one.id for one in draw(logits, [request])] == expected


def test_a_row_that_is_not_finite_is_no_error_behind_a_wrong_draft():
    request, other = make_request(), make_request(1)
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    first, second = logits[:2].argmax(-1).tolist()
    logits[2, 0] = math.nan
    request.drafts = [first, (second + 1) % VOCABULARY, 5]
    drawn = draw(logits, [request, other])
    assert [(one.request, one.error) for one in drawn] == [(request, None)] * 2 + [(other, None)]
    request.drafts = [first, second, 5]
    errors = [one.error is not None for one in draw(logits, [request, other])]
    assert errors == [False, False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_each_row_that_is_not_finite_is_told_apart(bad):
    requests = [make_request(i) for i in range(5)]
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    sound = draw(logits, requests)
    logits[1, 7] = logits[4, 0] = bad
    drawn = draw(logits, requests)
    assert [one.request for one in drawn] == requests
    assert [one.error is not None for one in drawn] == [False, True, False, False, True]
    assert [drawn[i] for i in (0, 2, 3)] == [sound[i] for i in (0, 2, 3)]


def test_of_nobody_nothing_is_drawn():
    assert draw(torch.randn(0, VOCABULARY), []) == []
