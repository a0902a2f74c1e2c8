"""A cache of bytes: how far it rounds, and that nothing else about attention changes."""

import pytest
import torch

from llama32 import load_model
from llama32.batch import Batch, Span
from llama32.cache import PagedCache
from llama32.generate import generate, step
from llama32.int8_cache import Int8Cache, Pool, in_a_row, int8_bytes_per_token
from llama32.paged import eager, fused
from llama32.settings import Sampling
from tests.checkpoints import random_model, tiny_config

SPANS = [
    Span([5, 6, 7], 6, [4, 0, 2]),  # nine tokens in pages of four, the last page with one
    Span([8], 0, [6]),
    Span([9, 10], 2, [1]),
]


def make(kind: type, **options):
    options = {"dtype": torch.float32, **options}
    return kind(tiny_config(), 8, 4, **options)


def test_numbers_are_within_half_a_step_of_their_head_s_largest():
    k = torch.randn(5, 2, 10) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    pool = Pool(torch.zeros(3, 4, 2, 10, dtype=torch.int8), torch.zeros(3, 4, 2))
    pool.write(torch.tensor([1, 0, 7, 4, 11]), k)
    found = pool.read(torch.tensor([0, 1, 2]), torch.float32).flatten(0, 1)
    step = k.abs().amax(-1, keepdim=True) / 127
    error = (found[[1, 0, 7, 4, 11]] - k).abs()
    assert (error <= step / 2 * 1.0001).all()
    assert not found[[2, 3, 5, 6, 8, 9, 10]].any()


def test_a_head_of_zeros_stays_zeros():
    pool = Pool(torch.zeros(1, 4, 2, 10, dtype=torch.int8), torch.zeros(1, 4, 2))
    pool.write(torch.tensor([2]), torch.zeros(1, 2, 10))
    assert pool.read(torch.tensor([0]), torch.bfloat16).eq(0).all()


@pytest.mark.parametrize("attend", [eager, fused])
def test_attention_is_that_over_the_rounded_numbers(attend):
    """Each sequence as if its keys and values had been rounded before a plain cache got them."""
    draw = torch.Generator().manual_seed(0)
    plain, small = make(PagedCache, attend=attend), make(Int8Cache, attend=attend)
    earlier = Batch.pack([Span(range(6), 0, [4, 0, 2]), Span([1, 2], 0, [1])], 4)
    new = Batch.pack(SPANS, 4)
    for batch in (earlier, new):
        n = batch.num_tokens
        q, k, v = (torch.randn(n, heads, 10, generator=draw) for heads in (6, 2, 2))
        found = [layer(q, k, v) for layer in small.attends(batch)]
        rounded = []
        for x in (k, v):
            pool = Pool(torch.zeros(1, n, 2, 10, dtype=torch.int8), torch.zeros(1, n, 2))
            pool.write(torch.arange(n), x)
            rounded.append(pool.read(torch.tensor([0]), torch.float32)[0])
        wanted = [layer(q, *rounded) for layer in plain.attends(batch)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("piece", [4, 8, 1024])
def test_a_context_in_pieces_is_the_context_in_one(piece, monkeypatch):
    monkeypatch.setattr("llama32.int8_cache.PIECE", piece)
    draw = torch.Generator().manual_seed(0)
    in_pieces, whole = make(Int8Cache), make(Int8Cache, attend=eager)
    earlier = Batch.pack([Span(range(9), 0, [4, 0, 2]), Span(range(7), 0, [1, 5])], 4)
    decoding = Batch.pack([Span([1], 9, [4, 0, 2]), Span([2], 7, [1, 5]), Span([3], 0, [3])], 4)
    for batch in (earlier, decoding):
        n = batch.num_tokens
        q, k, v = (torch.randn(n, heads, 10, generator=draw) for heads in (6, 2, 2))
        attends = zip(in_pieces.attends(batch), whole.attends(batch), strict=True)
        for one, other in attends:
            torch.testing.assert_close(one(q, k, v), other(q, k, v))
    assert in_pieces.attends(decoding)[0].pieces is not None
    assert len(in_pieces.attends(decoding)[0].pieces[0]) == -(-10 // piece)


def test_pages_of_a_batch_lie_in_a_row_and_no_others():
    pages, compact = in_a_row(Batch.pack(SPANS, 4, rows=9))
    assert pages.tolist() == [4, 0, 2, 6, 1]
    assert [span.pages for span in compact.spans] == [[0, 1, 2], [3], [4]]
    assert [span[:2] for span in compact.spans] == [span[:2] for span in SPANS]
    assert compact.is_in_place
    assert len(compact.tokens) == 9


def test_it_takes_a_byte_for_each_number_and_four_for_each_head():
    small = make(Int8Cache, dtype=torch.bfloat16)
    assert small.keys.dtype == small.values.dtype == torch.int8
    assert small.key_scales.shape == small.keys.shape[:-1]
    assert small.key_scales.dtype == torch.float32
    taken = sum(x.nbytes for x in (small.keys, small.values, small.key_scales, small.value_scales))
    assert taken == 8 * 4 * int8_bytes_per_token(tiny_config())
    llama_1b = tiny_config(
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64
    )
    assert int8_bytes_per_token(llama_1b) == 17408  # and 32768 in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_story_is_nearly_as_likely_as_before(dtype):
    """Token by token, of one story for both: two that are written freely part at the first tie."""
    model = load_model("tiny", dtype=dtype)
    greedy = Sampling(temperature=0, max_new_tokens=60, ignore_eos=True)
    story = [token.id for token in generate(model, [1, 300, 17, 25, 99], greedy)]

    def logprobs(kind: type) -> torch.Tensor:
        cache, pages = kind(model.config, 8, 16, dtype=dtype), []
        steps = [
            step(model, cache, Span([token], place, pages)) for place, token in enumerate(story)
        ]
        found = torch.cat(steps[:-1]).float().log_softmax(-1)
        return found.gather(-1, torch.tensor(story[1:]).unsqueeze(-1)).squeeze(-1)

    error = logprobs(PagedCache) - logprobs(Int8Cache)
    assert error.any()
    assert error.abs().max() < 0.1
    assert error.abs().mean() < 0.03


def test_logits_hardly_move():
    model = random_model(tiny_config())
    tokens = list(range(40))
    settings = Sampling(temperature=0, max_new_tokens=1, logprobs=0)
    (plain,) = generate(model, tokens, settings)
    cache = Int8Cache(model.config, 12, 4, dtype=torch.float32)
    (small,) = generate(model, tokens, settings, cache=cache)
    assert plain.id == small.id
    assert plain.logprobs.chosen == pytest.approx(small.logprobs.chosen, abs=0.1)
    assert plain.logprobs.chosen != small.logprobs.chosen
