"""The paged KV cache: growth, reads in place, and attention over pages on a CPU."""

import re
from pathlib import Path

import pytest
import torch

from llama32 import attention
from llama32.cache import paged_attention
from llama32.cache.batch import Batch, Span
from llama32.cache.kv_cache import PagedCache
from llama32.engine.scheduler import PREFILL_ALIGNMENT
from tests.checkpoints import tiny_config
from tests.closeness import assert_near


def make_cache(num_pages: int = 8, page_size: int = 4, **options) -> PagedCache:
    return PagedCache(tiny_config(), num_pages, page_size, dtype=torch.float32, **options)


def test_a_sequence_grows_page_by_page():
    cache = make_cache()
    pages: list[int] = []
    cache.grow(pages, 1)
    assert pages == [0]
    cache.grow(pages, 4)
    assert pages == [0]
    cache.grow(pages, 5)
    assert pages == [0, 1]
    cache.grow(pages, 14)
    assert pages == [0, 1, 2, 3]
    cache.release(pages)
    assert pages == []
    cache.grow(pages, 1)
    assert pages == [0]


def test_a_full_cache_raises_and_allocates_nothing():
    cache = make_cache(num_pages=2)
    pages = [cache.free_pages.pop()]
    with pytest.raises(MemoryError, match=r"1 free pages of 4 tokens, and 2 are needed"):
        cache.grow(pages, 12)
    assert len(pages) == 1
    assert len(cache.free_pages) == 1


def test_growth_moves_nothing():
    cache = make_cache()
    layer = cache.attention_fns(Batch.pack([Span([1, 2, 3], 0, [0])], 4))[0]
    q, k, v = (torch.randn(3, n, cache.keys.shape[-1]) for n in (4, 2, 2))
    layer(q, k, v)
    before, address = cache.keys.clone(), cache.keys.data_ptr()
    cache.grow([0], 16)
    assert cache.keys.data_ptr() == address
    assert torch.equal(cache.keys, before)
    assert torch.equal(cache.keys[0, 0, :3], k)


def read(pool: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
    batch = Batch.pack([Span([1], length - 1, pages)], page_size=4)
    return paged_attention.gather_slots(pool, batch.kv_locations[0], length)


def test_adjacent_pages_are_read_in_place():
    pool = torch.randn(8, 4, 2, 16)
    view = read(pool, [2, 3, 4], 10)
    assert view.shape == (10, 2, 16)
    assert view.data_ptr() == pool[2].data_ptr()
    assert torch.equal(view, pool.flatten(0, 1)[8:18])


def test_scattered_pages_are_gathered_in_order():
    pool = torch.randn(8, 4, 2, 16)
    gathered = read(pool, [5, 0, 1], 9)
    assert torch.equal(gathered, torch.cat((pool[5], pool[0], pool[1, :1])))


def test_pages_beyond_the_length_are_not_read():
    pool = torch.randn(8, 4, 2, 16)
    assert read(pool, [2, 7], 3).data_ptr() == pool[2].data_ptr()


@pytest.mark.parametrize(
    "pages", [([0, 1], [2, 3]), ([5, 2], [0, 7])], ids=["adjacent", "scattered"]
)
def test_sdpa_per_sequence_equals_eager_per_sequence(pages):
    spans = [Span([1] * 3, 0, pages[0]), Span([1], 6, pages[1])]
    batch = Batch.pack(spans, 4)
    q = torch.randn(4, 4, 16)
    keys, values = torch.randn(2, 8, 4, 2, 16)
    expected = paged_attention.eager_per_sequence(q, keys, values, batch)
    assert_near(paged_attention.sdpa_per_sequence(q, keys, values, batch), expected, within=2e-6)


DECODING = (
    [Span([1], 6, [0, 1]), Span([1], 0, [5]), Span([1], 7, [2, 3])],
    [Span([1], 6, [1, 0]), Span([1], 9, [7, 2, 4]), Span([1], 3, [3])],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", DECODING, ids=["adjacent", "scattered"])
def test_decode_has_the_bits_of_the_general_form(spans, dtype):
    batch = Batch.pack(spans, 4, num_rows=5)
    q = torch.randn(5, 4, 16).to(dtype)
    keys, values = torch.randn(2, 8, 4, 2, 16).to(dtype)
    expected = paged_attention.per_sequence(attention.fused, q, keys, values, batch)
    assert torch.equal(paged_attention.sdpa_per_sequence(q, keys, values, batch), expected)


@pytest.mark.parametrize("spans", DECODING, ids=["adjacent", "scattered"])
def test_gather_attention_equals_eager_despite_nan_in_unused_slots(spans):
    batch = Batch.pack(spans, 4, padding_page=6)
    q = torch.randn(3, 4, 16)
    keys, values = torch.randn(2, 8, 4, 2, 16)
    expected = paged_attention.eager_per_sequence(q, keys, values, batch)
    own = torch.zeros(8, 4, dtype=torch.bool)
    for span in spans:
        for i in range(span.length):
            own[span.pages[i // 4], i % 4] = True
    keys[~own] = values[~own] = torch.nan
    assert_near(paged_attention.gather_attention(q, keys, values, batch), expected, within=2e-6)


@pytest.mark.parametrize(
    "attend",
    [paged_attention.eager_per_sequence, paged_attention.sdpa_per_sequence],
    ids=["eager", "fused"],
)
def test_padding_rows_are_zeros_and_change_nothing(attend):
    spans = [Span([1] * 3, 0, [0, 1]), Span([1], 6, [2, 3])]
    q = torch.randn(7, 4, 16)
    keys, values = torch.randn(2, 8, 4, 2, 16)
    padded = attend(q, keys, values, Batch.pack(spans, 4, num_rows=7))
    assert not padded[4:].any()
    assert torch.equal(padded[:4], attend(q[:4], keys, values, Batch.pack(spans, 4)))


def test_prompt_attention_has_the_same_bits_for_any_cut_at_query_tiles():
    q = torch.randn(200, 4, 16)
    keys, values = torch.randn(2, 4, 64, 2, 16)
    whole = paged_attention.sdpa_per_sequence(
        q, keys, values, Batch.pack([Span([1] * 200, 0, [0, 1, 2, 3])], 64)
    )
    for cuts in ([64], [128], [64, 128, 192]):
        parts = []
        for start, stop in zip([0, *cuts], [*cuts, 200], strict=True):
            span = Span([1] * (stop - start), start, [0, 1, 2, 3])
            parts.append(
                paged_attention.sdpa_per_sequence(
                    q[start:stop], keys, values, Batch.pack([span], 64)
                )
            )
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("start", "stop", "cuts"),
    [
        (0, 64, [(0, 64)]),
        (0, 130, [(0, 64), (64, 128), (128, 130)]),
        (20, 150, [(20, 64), (64, 128), (128, 150)]),
        (63, 65, [(63, 64), (64, 65)]),
        (70, 71, [(70, 71)]),
    ],
)
def test_query_tiles_end_at_multiples_of_the_tile_size(start, stop, cuts):
    assert list(paged_attention.query_tiles(start, stop)) == cuts


def test_prefill_chunks_are_aligned_with_query_tiles():
    assert PREFILL_ALIGNMENT == paged_attention.QUERY_TILE


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system has no /proc/self/status")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])


def test_a_cpu_cache_takes_memory_when_written():
    page = make_cache(num_pages=1).keys[:, 0].nbytes
    before = resident()
    large = make_cache(num_pages=(1 << 29) // page)
    large.keys[:, -1] = 1
    assert not large.keys[:, -2].any()
    assert resident() - before < 1 << 28


def test_a_cache_larger_than_memory_is_refused_with_the_size():
    with pytest.raises(MemoryError, match=r"KV cache of 1,9.*,000 bytes .* make it smaller"):
        make_cache(num_pages=10**15)


def test_the_default_backend_is_the_fastest():
    assert make_cache().attend is paged_attention.sdpa_per_sequence
    assert (
        make_cache(attend=paged_attention.eager_per_sequence).attend
        is paged_attention.eager_per_sequence
    )


def test_the_cache_writes_only_the_slots_of_the_step():
    cache = make_cache()
    cache.keys.fill_(7.0)
    layer = cache.attention_fns(Batch.pack([Span([1, 2], 3, [6, 1])], 4))[1]
    q, k, v = (torch.randn(2, n, cache.keys.shape[-1]) for n in (4, 2, 2))
    layer(q, k, v)
    assert torch.equal(cache.keys[1, 6, 3], k[0])
    assert torch.equal(cache.keys[1, 1, 0], k[1])
    touched = (cache.keys != 7.0).flatten(3).any(-1)
    assert touched.nonzero().tolist() == [[1, 1, 0], [1, 6, 3]]
