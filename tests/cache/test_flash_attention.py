"""Flash attention over pages, on a CPU with a slow kernel of the same behavior."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llama32 import attention
from llama32.cache import flash_attention, paged_attention
from llama32.cache.batch import Batch, Span
from tests.closeness import assert_near
from tests.fake_kernels import slow_kernel

C = 4  # slots of a page

SPANS = {
    "adjacent prompts": [Span([1] * 3, 0, [5]), Span([1] * 5, 2, [1, 2])],
    "scattered prompts": [Span([1] * 3, 0, [5]), Span([1] * 5, 2, [2, 1])],
    "adjacent decode": [Span([1], 9, [4, 5, 6]), Span([1], 0, [0]), Span([1], 3, [2])],
    "scattered decode": [Span([1], 9, [4, 6, 1]), Span([1], 0, [7]), Span([1], 4, [5, 2])],
    "one page decode": [Span([1], 2, [4]), Span([1], 0, [7])],
    "both": [Span([1], 9, [4, 6, 1]), Span([1] * 4, 0, [7])],
}


def pools(seed: int = 0) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 8, C, 2, 16, generator=torch.Generator().manual_seed(seed))
    return keys, values


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize("padding", [0, 2])
def test_flash_equals_eager(spans, padding):
    rows = sum(len(span.tokens) for span in spans) + padding
    batch = Batch.pack(spans, C, num_rows=rows, padding_page=3)
    q = torch.randn(rows, 4, 16)
    expected = paged_attention.eager_per_sequence(q, *pools(), batch)
    mixed = flash_attention.flash(q, *pools(), batch, slow_kernel)
    assert_near(mixed, expected, within=2e-6)
    assert not mixed[rows - padding :].any()


def test_flash_reads_adjacent_pages_in_place():
    seen = []

    def kernel(q, k, *rest):
        seen.append(k)
        return slow_kernel(q, k, *rest)

    keys, values = pools()
    for name in ("adjacent prompts", "scattered prompts", "scattered decode"):
        batch = Batch.pack(SPANS[name], C)
        flash_attention.flash(torch.randn(batch.num_tokens, 4, 16), keys, values, batch, kernel)
    assert [k.data_ptr() == keys.data_ptr() for k in seen] == [True, False, True]


def test_slots_of_other_sequences_are_not_read():
    spans = SPANS["scattered decode"]
    batch = Batch.pack(spans, C, padding_page=3)
    q = torch.randn(3, 4, 16)
    keys, values = pools()
    expected = flash_attention.flash(q, keys, values, batch, slow_kernel)
    own = torch.zeros(8, C, dtype=torch.bool)
    for span in spans:
        for i in range(span.length):
            own[span.pages[i // C], i % C] = True
    keys[~own] = values[~own] = torch.nan
    assert torch.equal(flash_attention.flash(q, keys, values, batch, slow_kernel), expected)


def test_a_sequence_has_the_same_bits_beside_a_longer_sequence():
    """A wider page table means more empty parts to merge."""
    q = torch.randn(2, 4, 16)
    span = Span([1], 10, [4, 6, 1])
    alone = flash_attention.flash(q[:1], *pools(), Batch.pack([span], C), slow_kernel)
    for pages in ([0, 2, 3, 5], [0, 2, 3, 5, 7]):
        longer = Span([1], C * len(pages) - 1, pages)
        both = flash_attention.flash(q, *pools(), Batch.pack([span, longer], C), slow_kernel)
        assert torch.equal(both[:1], alone)


@pytest.mark.parametrize("W", [1, 2, 3, 5, 8])
def test_partial_results_merge_into_the_whole(W):
    q, k, v = torch.randn(1, 4, 16), torch.randn(40, 4, 16), torch.randn(40, 4, 16)
    cuts = [0, *sorted(torch.randperm(39)[: W - 1].add(1).tolist()), 40]
    parts, lses = [], []
    for start, stop in pairwise(cuts):
        parts.append(attention.eager(q, k[start:stop], v[start:stop]))
        scores = torch.einsum("qhd,shd->qhs", q, k[start:stop]) / 4
        lses.append(scores.logsumexp(-1))
    merged = flash_attention.merge_partials(torch.stack(parts, 1), torch.stack(lses, 1))
    assert_near(merged, attention.eager(q, k, v), within=2e-6)


def test_large_scores_do_not_overflow_in_a_merge():
    parts, lse = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([[[900.0], [900.0]]])
    assert flash_attention.merge_partials(parts, lse).item() == 2.0
    lse[0, 1] = -math.inf
    assert flash_attention.merge_partials(parts, lse).item() == 1.0


def test_zeros_at_the_end_change_no_bit_of_a_pairwise_sum():
    x = torch.randn(3, 13, 2, 5)
    total = flash_attention.pairwise_sum(x)
    assert_near(total, x.sum(1), within=1e-5)
    for more in (1, 3, 4, 50):
        longer = torch.cat((x, torch.zeros(3, more, 2, 5)), 1)
        assert torch.equal(flash_attention.pairwise_sum(longer), total)
    assert not torch.equal(torch.cat((x, torch.zeros(3, 50, 2, 5)), 1).sum(1), total)


def test_this_torch_has_the_operator_with_the_expected_arguments():
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    names = [argument.name for argument in arguments]
    positional = "query key value cum_seq_q cum_seq_k max_q max_k".split()
    assert names[: len(positional)] == positional
    assert {"dropout_p", "is_causal", "return_debug_mask", "seqused_k"} <= {*names}


def test_the_fastest_form_on_a_cpu_is_sdpa():
    fastest = partial(flash_attention.select_backend, torch.device("cpu"), torch.bfloat16, 64)
    assert fastest(128) is paged_attention.sdpa_per_sequence


def test_static_shape_variants():
    assert flash_attention.static_shape_variant(flash_attention.flash) is flash_attention.split_kv
    assert (
        flash_attention.static_shape_variant(paged_attention.sdpa_per_sequence)
        is paged_attention.gather_attention
    )
