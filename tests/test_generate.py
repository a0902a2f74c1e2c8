"""The minimal generation loop."""

import pytest
import torch

from llama32.cache import paged_attention
from llama32.cache.kv_cache import PagedCache
from llama32.generate import generate
from llama32.sampling_params import Sampling
from tests.checkpoints import random_model, tiny_config

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
CONTEXT = 64


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocab_size=100, max_position_embeddings=CONTEXT))


def ids(model, prompt=PROMPT, **settings) -> list[int]:
    options = {name: settings.pop(name) for name in ("eos_ids", "cache") if name in settings}
    return [token.id for token in generate(model, prompt, Sampling(**settings), **options)]


def test_greedy_is_the_same_every_time_and_ends_by_length(model):
    tokens = list(generate(model, PROMPT, Sampling(temperature=0, max_new_tokens=9)))
    assert [t.finish_reason for t in tokens] == [None] * 8 + ["length"]
    assert [t.id for t in tokens] == ids(model, temperature=0, max_new_tokens=9)


def test_the_same_seed_gives_the_same_text(model):
    first = ids(model, seed=7, max_new_tokens=30)
    torch.manual_seed(99)
    ids(model, max_new_tokens=5)
    assert ids(model, seed=7, max_new_tokens=30) == first
    assert ids(model, seed=8, max_new_tokens=30) != first


def test_without_a_seed_texts_differ(model):
    assert len({tuple(ids(model, max_new_tokens=20)) for _ in range(4)}) > 1


def test_an_eos_ends_the_text_and_is_its_last_token(model):
    tokens = ids(model, temperature=0, max_new_tokens=30)
    end = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    stopped = list(
        generate(model, PROMPT, Sampling(temperature=0, max_new_tokens=30), eos_ids=[tokens[end]])
    )
    assert [t.id for t in stopped] == tokens[: end + 1]
    assert stopped[-1].finish_reason == "stop"
    assert ids(model, temperature=0, max_new_tokens=30, stop_ids=[tokens[end]]) == tokens[: end + 1]
    ignoring = {"ignore_eos": True, "eos_ids": [tokens[end]]}
    assert ids(model, temperature=0, max_new_tokens=30, **ignoring) == tokens
    both = ignoring | {"stop_ids": [tokens[end]]}
    assert ids(model, temperature=0, max_new_tokens=30, **both) == tokens[: end + 1]


def test_the_end_of_the_context_ends_the_text(model):
    assert len(ids(model, temperature=0, max_new_tokens=1000)) == CONTEXT - len(PROMPT)
    assert len(ids(model, PROMPT * 7 + PROMPT[:7], temperature=0)) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "it is empty"),
        ([1] * CONTEXT, "no room for an answer in the model's context of 64"),
        ([5, 100], "token id 100 is outside the vocabulary of 100"),
        ([-1], "token id -1 is outside"),
    ],
    ids=["empty", "too long", "beyond", "negative"],
)
def test_an_impossible_prompt_is_refused_at_the_call(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, Sampling())


def test_prefill_reports_its_progress_chunk_by_chunk(model):
    seen = []
    tokens = generate(
        model, PROMPT, Sampling(), chunk=3, on_prefill=lambda *done: seen.append(done)
    )
    assert seen == []
    next(tokens)
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_pages_are_released_at_the_end_and_when_the_iterator_is_closed(model):
    cache = PagedCache(model.config, 8, 16, dtype=torch.float32)
    ids(model, cache=cache, max_new_tokens=20)
    assert len(cache.free_pages) == 8
    tokens = generate(model, PROMPT, Sampling(max_new_tokens=20), cache=cache)
    next(tokens)
    assert len(cache.free_pages) == 7
    tokens.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(cache.free_pages) == 8


def test_logprobs_are_of_the_chosen_token_and_the_likeliest(model):
    tokens = list(generate(model, PROMPT, Sampling(temperature=0, max_new_tokens=3, logprobs=2)))
    with torch.no_grad():
        expected = model(torch.tensor(PROMPT))[-1].log_softmax(-1)
    logprobs = tokens[0].logprobs
    assert logprobs is not None
    assert list(logprobs.top) == expected.topk(2).indices.tolist()
    assert logprobs.chosen == pytest.approx(expected.max().item(), abs=1e-5)
    assert tokens[0].id == next(iter(logprobs.top))


def test_prefill_of_a_long_prompt_runs_in_chunks(model):
    seen = []

    def spy(q, keys, values, batch):
        seen.append(len(q))
        return paged_attention.sdpa_per_sequence(q, keys, values, batch)

    cache = PagedCache(model.config, 4, 16, dtype=torch.float32, attend=spy)
    next(generate(model, PROMPT * 5, Sampling(max_new_tokens=1), cache=cache, chunk=16))
    assert seen == [16] * 6 + [8] * 3  # three layers
