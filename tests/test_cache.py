import re
from pathlib import Path

import pytest
import torch

from llama32 import attention, paged
from llama32.batch import Batch, Span
from llama32.cache import PagedCache
from llama32.engine.scheduler import BLOCK
from tests.checkpoints import tiny_config


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


def test_a_full_cache_says_what_is_missing_and_takes_nothing():
    cache = make_cache(num_pages=2)
    pages = [cache.free.pop()]
    with pytest.raises(MemoryError, match=r"1 free pages of 4 tokens, and 2 are needed"):
        cache.grow(pages, 12)
    assert len(pages) == 1
    assert len(cache.free) == 1


def test_growing_moves_nothing():
    cache = make_cache()
    layer = cache.attends(Batch.pack([Span([1, 2, 3], 0, [0])], 4))[0]
    q, k, v = (torch.randn(3, n, cache.keys.shape[-1]) for n in (4, 2, 2))
    layer(q, k, v)
    before, at = cache.keys.clone(), cache.keys.data_ptr()
    cache.grow([0], 16)
    assert cache.keys.data_ptr() == at
    assert torch.equal(cache.keys, before)
    assert torch.equal(cache.keys[0, 0, :3], k)


def read(pool: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
    batch = Batch.pack([Span([1], length - 1, pages)], page_size=4)
    return paged.read(pool, batch.reads[0], length)


def test_pages_in_a_row_are_read_in_place():
    pool = torch.randn(8, 4, 2, 16)
    view = read(pool, [2, 3, 4], 10)
    assert view.shape == (10, 2, 16)
    assert view.data_ptr() == pool[2].data_ptr()
    assert torch.equal(view, pool.flatten(0, 1)[8:18])


def test_scattered_pages_are_read_in_their_order():
    pool = torch.randn(8, 4, 2, 16)
    gathered = read(pool, [5, 0, 1], 9)
    assert torch.equal(gathered, torch.cat((pool[5], pool[0], pool[1, :1])))


def test_pages_beyond_the_length_are_not_read():
    pool = torch.randn(8, 4, 2, 16)
    assert read(pool, [2, 7], 3).data_ptr() == pool[2].data_ptr()


@pytest.mark.parametrize("pages", [([0, 1], [2, 3]), ([5, 2], [0, 7])], ids=["rows", "scattered"])
def test_paged_fused_equals_paged_eager(pages):
    spans = [Span([1] * 3, 0, pages[0]), Span([1], 6, pages[1])]
    batch = Batch.pack(spans, 4)
    q = torch.randn(4, 4, 16)
    keys, values = torch.randn(2, 8, 4, 2, 16)
    expected = paged.eager(q, keys, values, batch)
    torch.testing.assert_close(paged.fused(q, keys, values, batch), expected, atol=2e-6, rtol=0)


DECODING = (
    [Span([1], 6, [0, 1]), Span([1], 0, [5]), Span([1], 7, [2, 3])],
    [Span([1], 6, [1, 0]), Span([1], 9, [7, 2, 4]), Span([1], 3, [3])],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", DECODING, ids=["rows", "scattered"])
def test_one_query_each_is_bitwise_sequence_after_sequence(spans, dtype):
    batch = Batch.pack(spans, 4, rows=5)
    q = torch.randn(5, 4, 16).to(dtype)
    keys, values = torch.randn(2, 8, 4, 2, 16).to(dtype)
    one_by_one = paged.one_by_one(attention.fused, q, keys, values, batch)
    assert torch.equal(paged.fused(q, keys, values, batch), one_by_one)


@pytest.mark.parametrize("spans", DECODING, ids=["rows", "scattered"])
def test_gathered_equals_eager_whatever_others_left_in_the_pages(spans):
    batch = Batch.pack(spans, 4, spare=6)
    q = torch.randn(3, 4, 16)
    keys, values = torch.randn(2, 8, 4, 2, 16)
    expected = paged.eager(q, keys, values, batch)
    own = torch.zeros(8, 4, dtype=torch.bool)
    for span in spans:
        for i in range(span.length):
            own[span.pages[i // 4], i % 4] = True
    keys[~own] = values[~own] = torch.nan
    torch.testing.assert_close(paged.gathered(q, keys, values, batch), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("attend", [paged.eager, paged.fused], ids=["eager", "fused"])
def test_rows_of_no_sequence_are_zeros_and_change_nothing(attend):
    spans = [Span([1] * 3, 0, [0, 1]), Span([1], 6, [2, 3])]
    q = torch.randn(7, 4, 16)
    keys, values = torch.randn(2, 8, 4, 2, 16)
    padded = attend(q, keys, values, Batch.pack(spans, 4, rows=7))
    assert not padded[4:].any()
    assert torch.equal(padded[:4], attend(q[:4], keys, values, Batch.pack(spans, 4)))


def test_a_prompt_s_attention_has_the_same_bits_however_it_is_cut_at_blocks():
    q = torch.randn(200, 4, 16)
    keys, values = torch.randn(2, 4, 64, 2, 16)
    whole = paged.fused(q, keys, values, Batch.pack([Span([1] * 200, 0, [0, 1, 2, 3])], 64))
    for cuts in ([64], [128], [64, 128, 192]):
        parts = []
        for start, stop in zip([0, *cuts], [*cuts, 200], strict=True):
            span = Span([1] * (stop - start), start, [0, 1, 2, 3])
            parts.append(paged.fused(q[start:stop], keys, values, Batch.pack([span], 64)))
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
def test_queries_are_cut_where_positions_are_multiples_wherever_they_start(start, stop, cuts):
    assert list(paged.blocks(start, stop)) == cuts


def test_prompts_are_cut_into_steps_where_attention_cuts_them_anyhow():
    assert BLOCK == paged.QUERY_BLOCK


def resident() -> int:
    """Bytes of memory that this process holds."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])


def test_memory_of_a_cpu_s_cache_is_taken_as_it_is_written():
    page = make_cache(num_pages=1).keys[:, 0].nbytes
    before = resident()
    large = make_cache(num_pages=(1 << 29) // page)
    large.keys[:, -1] = 1
    assert not large.keys[:, -2].any()
    assert resident() - before < 1 << 28


def test_a_cache_beyond_all_memory_is_refused_with_its_size():
    with pytest.raises(MemoryError, match=r"KV cache of 1,9.*,000 bytes .* make it smaller"):
        make_cache(num_pages=10**15)


def test_pages_are_read_in_the_fastest_form_unless_another_is_given():
    assert make_cache().attend is paged.fused
    assert make_cache(attend=paged.eager).attend is paged.eager


def test_the_cache_writes_only_the_slots_of_the_step():
    cache = make_cache()
    cache.keys.fill_(7.0)
    layer = cache.attends(Batch.pack([Span([1, 2], 3, [6, 1])], 4))[1]
    q, k, v = (torch.randn(2, n, cache.keys.shape[-1]) for n in (4, 2, 2))
    layer(q, k, v)
    assert torch.equal(cache.keys[1, 6, 3], k[0])
    assert torch.equal(cache.keys[1, 1, 0], k[1])
    touched = (cache.keys != 7.0).flatten(3).any(-1)
    assert touched.nonzero().tolist() == [[1, 1, 0], [1, 6, 3]]
