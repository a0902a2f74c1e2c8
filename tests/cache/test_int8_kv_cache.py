"""The int8 KV cache: rounding errors are bounded, and attention is otherwise unchanged."""

import pytest
import torch

from llama32 import load_model
from llama32.cache.batch import Batch, Span
from llama32.cache.int8_kv_cache import Int8Cache, QuantizedPool, compact, int8_bytes_per_token
from llama32.cache.kv_cache import PagedCache
from llama32.cache.paged_attention import eager_per_sequence, sdpa_per_sequence
from llama32.generate import forward, generate
from llama32.sampling_params import Sampling
from tests.checkpoints import random_model, tiny_config

SPANS = [
    Span([5, 6, 7], 6, [4, 0, 2]),  # nine tokens in pages of four, the last page with one
    Span([8], 0, [6]),
    Span([9, 10], 2, [1]),
]


def make_cache(kind: type, **options):
    options = {"dtype": torch.float32, **options}
    return kind(tiny_config(), 8, 4, **options)


def test_rounding_is_within_half_a_step_of_the_largest_number_of_a_head():
    k = torch.randn(5, 2, 10) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    pool = QuantizedPool(torch.zeros(3, 4, 2, 10, dtype=torch.int8), torch.zeros(3, 4, 2))
    pool.write(torch.tensor([1, 0, 7, 4, 11]), k)
    stored = pool.read(torch.tensor([0, 1, 2]), torch.float32).flatten(0, 1)
    step = k.abs().amax(-1, keepdim=True) / 127
    error = (stored[[1, 0, 7, 4, 11]] - k).abs()
    assert (error <= step / 2 * 1.0001).all()
    assert not stored[[2, 3, 5, 6, 8, 9, 10]].any()


def test_a_head_of_zeros_stays_zeros():
    pool = QuantizedPool(torch.zeros(1, 4, 2, 10, dtype=torch.int8), torch.zeros(1, 4, 2))
    pool.write(torch.tensor([2]), torch.zeros(1, 2, 10))
    assert pool.read(torch.tensor([0]), torch.bfloat16).eq(0).all()


@pytest.mark.parametrize("attend", [eager_per_sequence, sdpa_per_sequence])
def test_attention_equals_a_plain_cache_of_rounded_keys_and_values(attend):
    generator = torch.Generator().manual_seed(0)
    plain, int8 = make_cache(PagedCache, attend=attend), make_cache(Int8Cache, attend=attend)
    earlier = Batch.pack([Span(range(6), 0, [4, 0, 2]), Span([1, 2], 0, [1])], 4)
    new = Batch.pack(SPANS, 4)
    for batch in (earlier, new):
        n = batch.num_tokens
        q, k, v = (torch.randn(n, heads, 10, generator=generator) for heads in (6, 2, 2))
        actual = [layer(q, k, v) for layer in int8.attention_fns(batch)]
        rounded = []
        for x in (k, v):
            pool = QuantizedPool(torch.zeros(1, n, 2, 10, dtype=torch.int8), torch.zeros(1, n, 2))
            pool.write(torch.arange(n), x)
            rounded.append(pool.read(torch.tensor([0]), torch.float32)[0])
        expected = [layer(q, *rounded) for layer in plain.attention_fns(batch)]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("chunk", [4, 8, 1024])
def test_decode_in_chunks_equals_decode_in_one_piece(chunk, monkeypatch):
    monkeypatch.setattr("llama32.cache.int8_kv_cache.CHUNK_SLOTS", chunk)
    generator = torch.Generator().manual_seed(0)
    chunked, reference = make_cache(Int8Cache), make_cache(Int8Cache, attend=eager_per_sequence)
    earlier = Batch.pack([Span(range(9), 0, [4, 0, 2]), Span(range(7), 0, [1, 5])], 4)
    decoding = Batch.pack([Span([1], 9, [4, 0, 2]), Span([2], 7, [1, 5]), Span([3], 0, [3])], 4)
    for batch in (earlier, decoding):
        n = batch.num_tokens
        q, k, v = (torch.randn(n, heads, 10, generator=generator) for heads in (6, 2, 2))
        layers = zip(chunked.attention_fns(batch), reference.attention_fns(batch), strict=True)
        for layer, expected in layers:
            torch.testing.assert_close(layer(q, k, v), expected(q, k, v))
    assert chunked.attention_fns(decoding)[0].chunks is not None
    assert len(chunked.attention_fns(decoding)[0].chunks[0]) == -(-10 // chunk)


def test_compact_keeps_the_pages_of_the_batch_only_and_makes_them_adjacent():
    pages, compacted = compact(Batch.pack(SPANS, 4, num_rows=9))
    assert pages.tolist() == [4, 0, 2, 6, 1]
    assert [span.pages for span in compacted.spans] == [[0, 1, 2], [3], [4]]
    assert [span[:2] for span in compacted.spans] == [span[:2] for span in SPANS]
    assert compacted.is_contiguous
    assert len(compacted.tokens) == 9


def test_a_token_takes_a_byte_per_number_and_four_per_head():
    cache = make_cache(Int8Cache, dtype=torch.bfloat16)
    assert cache.keys.dtype == cache.values.dtype == torch.int8
    assert cache.key_scales.shape == cache.keys.shape[:-1]
    assert cache.key_scales.dtype == torch.float32
    tensors = cache.keys, cache.values, cache.key_scales, cache.value_scales
    assert sum(x.nbytes for x in tensors) == 8 * 4 * int8_bytes_per_token(tiny_config())
    llama_1b = tiny_config(
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64
    )
    assert int8_bytes_per_token(llama_1b) == 17408  # and 32768 in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_a_story_hardly_change(dtype):
    """Compare both caches on one story: two generated stories would part at the first tie."""
    model = load_model("tiny", dtype=dtype)
    greedy = Sampling(temperature=0, max_new_tokens=60, ignore_eos=True)
    story = [token.id for token in generate(model, [1, 300, 17, 25, 99], greedy)]

    def logprobs(kind: type) -> torch.Tensor:
        cache, pages = kind(model.config, 8, 16, dtype=dtype), []
        steps = [forward(model, cache, Span([token], i, pages)) for i, token in enumerate(story)]
        values = torch.cat(steps[:-1]).float().log_softmax(-1)
        return values.gather(-1, torch.tensor(story[1:]).unsqueeze(-1)).squeeze(-1)

    error = logprobs(PagedCache) - logprobs(Int8Cache)
    assert error.any()
    assert error.abs().max() < 0.1
    assert error.abs().mean() < 0.03


def test_log_probabilities_after_a_prompt_hardly_change():
    model = random_model(tiny_config())
    tokens = list(range(40))
    settings = Sampling(temperature=0, max_new_tokens=1, logprobs=0)
    (plain,) = generate(model, tokens, settings)
    cache = Int8Cache(model.config, 12, 4, dtype=torch.float32)
    (int8,) = generate(model, tokens, settings, cache=cache)
    assert plain.id == int8.id
    assert plain.logprobs.chosen == pytest.approx(int8.logprobs.chosen, abs=0.1)
    assert plain.logprobs.chosen != int8.logprobs.chosen
