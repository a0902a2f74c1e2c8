"""Equalities of the cached forward pass: exact if both sides multiply the same shapes, otherwise
(a single row against many rows) to the rounding of fp32."""

import pytest
import torch

from llama32 import attention
from llama32.cache import paged_attention
from llama32.cache.batch import Batch, Span
from llama32.cache.kv_cache import PagedCache
from llama32.generate import generate
from llama32.sampling_params import Sampling
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near

ROUNDED = {"within": 1e-5}
TOKENS = torch.randint(100, (41,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(
    params=[paged_attention.eager_per_sequence, paged_attention.sdpa_per_sequence],
    ids=["eager", "fused"],
)
def attend(request):
    return request.param


@pytest.fixture
def model():
    return random_model(tiny_config(vocab_size=100))


def make_cache(
    model, page_size: int = 16, attend=paged_attention.sdpa_per_sequence, num_pages: int = 16
) -> PagedCache:
    return PagedCache(
        model.config, num_pages, page_size, dtype=model.norm.weight.dtype, attend=attend
    )


@torch.no_grad()
def run(model, cache: PagedCache, tokens: list[int], cuts: list[int], pages=None) -> torch.Tensor:
    """Return the logits of all tokens, computed through the cache in pieces that end at `cuts`."""
    pages = [] if pages is None else pages
    logits, start = [], 0
    for end in [*cuts, len(tokens)]:
        cache.grow(pages, end)
        batch = Batch.pack([Span(tokens[start:end], start, pages)], cache.page_size)
        logits.append(model(batch.tokens, batch.positions, cache.attention_fns(batch)))
        start = end
    return torch.cat(logits)


def test_cached_equals_uncached(model, attend):
    with torch.no_grad():
        uncached = model(torch.tensor([TOKENS]))[0]
    for cuts in ([], list(range(1, len(TOKENS))), [1, 2, 30]):
        cached = run(model, make_cache(model, attend=attend), TOKENS, cuts)
        assert_near(cached, uncached, **ROUNDED)


def test_a_prompt_in_one_piece_is_bitwise_the_uncached_one(model):
    with torch.no_grad():
        uncached = model(torch.tensor(TOKENS), attend=attention.fused)
    assert torch.equal(run(model, make_cache(model), TOKENS, []), uncached)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_a_prompt_in_chunks_equals_the_whole(model, attend, chunk):
    whole = run(model, make_cache(model, attend=attend), TOKENS, [])
    cuts = list(range(chunk, len(TOKENS), chunk))
    chunked = run(model, make_cache(model, attend=attend), TOKENS, cuts)
    assert_near(chunked, whole, **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_page_size_is_irrelevant_to_the_last_bit(attend, dtype):
    model = random_model(tiny_config(vocab_size=100), dtype=dtype)
    cuts = [20, 21, 22]
    one_page = run(model, make_cache(model, 64, attend), TOKENS, cuts)
    for page_size in (1, 4, 7, 16):
        cache = make_cache(model, page_size, attend, num_pages=64)
        assert torch.equal(run(model, cache, TOKENS, cuts), one_page)


def test_which_pages_a_sequence_has_is_irrelevant_to_the_last_bit(attend):
    model = random_model(tiny_config(vocab_size=100))
    in_a_row = run(model, make_cache(model, 4, attend), TOKENS, [20, 21])
    scattered = make_cache(model, 4, attend)
    scattered.keys.fill_(9.0)  # old contents are never read
    pages = [9, 3, 4, 15, 0, 1, 2, 11, 5, 7, 6]
    assert torch.equal(run(model, scattered, TOKENS, [20, 21], pages), in_a_row)


def test_packed_sequences_equal_each_alone(model, attend):
    lengths = (5, 1, 12)
    sequences = [TOKENS[:5], TOKENS[5:6], TOKENS[6:18]]
    alone = [run(model, make_cache(model, attend=attend), tokens, []) for tokens in sequences]
    batch = Batch.pack([Span(s, 0, [page]) for page, s in enumerate(sequences)], 16)
    cache = make_cache(model, attend=attend)
    with torch.no_grad():
        packed = model(batch.tokens, batch.positions, cache.attention_fns(batch))
        rows = model(
            batch.tokens, batch.positions, cache.attention_fns(batch), logits_at=batch.last_tokens
        )
    for ours, expected in zip(packed.split(lengths), alone, strict=True):
        assert_near(ours, expected, **ROUNDED)
    assert_near(rows, packed[batch.last_tokens], **ROUNDED)


def test_packed_equals_padded_to_the_last_bit():
    """Two sequences of one length: the same rows go through the same products."""
    model = random_model(tiny_config(vocab_size=100))
    pair = [TOKENS[:16], TOKENS[16:32]]
    batch = Batch.pack([Span(s, 0, [page]) for page, s in enumerate(pair)], 16)
    cache = make_cache(model)
    with torch.no_grad():
        packed = model(batch.tokens, batch.positions, cache.attention_fns(batch))
        padded = model(torch.tensor(pair))
    assert torch.equal(packed.unflatten(0, (2, 16)), padded)


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_generate_gives_the_tokens_of_the_uncached_model(model, chunk):
    ids = list(TOKENS)
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    greedy = Sampling(temperature=0, max_new_tokens=20)
    tokens = generate(model, TOKENS, greedy, chunk=chunk)
    assert [token.id for token in tokens] == ids[len(TOKENS) :]
