"""The GPU's way through the pages, with a kernel that does on a CPU what the real one promises."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llama32 import attention, flash, paged
from llama32.batch import Batch, Span
from tests.kernels import slow_kernel

C = 4  # slots of a page


SPANS = {
    "prompts in a row": [Span([1] * 3, 0, [5]), Span([1] * 5, 2, [1, 2])],
    "prompts scattered": [Span([1] * 3, 0, [5]), Span([1] * 5, 2, [2, 1])],
    "decoding in a row": [Span([1], 9, [4, 5, 6]), Span([1], 0, [0]), Span([1], 3, [2])],
    "decoding scattered": [Span([1], 9, [4, 6, 1]), Span([1], 0, [7]), Span([1], 4, [5, 2])],
    "decoding one page": [Span([1], 2, [4]), Span([1], 0, [7])],
    "both": [Span([1], 9, [4, 6, 1]), Span([1] * 4, 0, [7])],
}


def pools(seed: int = 0) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 8, C, 2, 16, generator=torch.Generator().manual_seed(seed))
    return keys, values


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize("blank", [0, 2])
def test_flash_equals_eager(spans, blank):
    rows = sum(len(span.tokens) for span in spans) + blank
    batch = Batch.pack(spans, C, rows=rows, spare=3)
    q = torch.randn(rows, 4, 16)
    expected = paged.eager(q, *pools(), batch)
    mixed = flash.flash(q, *pools(), batch, slow_kernel)
    torch.testing.assert_close(mixed, expected, atol=2e-6, rtol=0)
    assert not mixed[rows - blank :].any()


def test_flash_reads_in_place_what_lies_in_a_row():
    seen = []

    def kernel(q, k, *rest):
        seen.append(k)
        return slow_kernel(q, k, *rest)

    keys, values = pools()
    for name in ("prompts in a row", "prompts scattered", "decoding scattered"):
        batch = Batch.pack(SPANS[name], C)
        flash.flash(torch.randn(batch.num_tokens, 4, 16), keys, values, batch, kernel)
    assert [k.data_ptr() == keys.data_ptr() for k in seen] == [True, False, True]


def test_what_others_left_in_the_pages_is_not_read():
    spans = SPANS["decoding scattered"]
    batch = Batch.pack(spans, C, spare=3)
    q = torch.randn(3, 4, 16)
    keys, values = pools()
    expected = flash.flash(q, keys, values, batch, slow_kernel)
    own = torch.zeros(8, C, dtype=torch.bool)
    for span in spans:
        for i in range(span.length):
            own[span.pages[i // C], i % C] = True
    keys[~own] = values[~own] = torch.nan
    assert torch.equal(flash.flash(q, keys, values, batch, slow_kernel), expected)


def test_a_sequence_has_the_same_bits_beside_a_longer_one():
    """The wider the page table, the more empty shares there are to merge."""
    q = torch.randn(2, 4, 16)
    span = Span([1], 10, [4, 6, 1])
    alone = flash.flash(q[:1], *pools(), Batch.pack([span], C), slow_kernel)
    for pages in ([0, 2, 3, 5], [0, 2, 3, 5, 7]):
        longer = Span([1], C * len(pages) - 1, pages)
        both = flash.flash(q, *pools(), Batch.pack([span, longer], C), slow_kernel)
        assert torch.equal(both[:1], alone)


@pytest.mark.parametrize("W", [1, 2, 3, 5, 8])
def test_shares_of_a_softmax_merge_into_the_whole(W):
    q, k, v = torch.randn(1, 4, 16), torch.randn(40, 4, 16), torch.randn(40, 4, 16)
    cuts = [0, *sorted(torch.randperm(39)[: W - 1].add(1).tolist()), 40]
    parts, sums = [], []
    for start, stop in pairwise(cuts):
        parts.append(attention.eager(q, k[start:stop], v[start:stop]))
        scores = torch.einsum("qhd,shd->qhs", q, k[start:stop]) / 4
        sums.append(scores.logsumexp(-1))
    merged = flash.merge(torch.stack(parts, 1), torch.stack(sums, 1))
    torch.testing.assert_close(merged, attention.eager(q, k, v), atol=1e-6, rtol=0)


def test_large_scores_do_not_overflow_when_shares_merge():
    parts, sums = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([[[900.0], [900.0]]])
    assert flash.merge(parts, sums).item() == 2.0
    sums[0, 1] = -math.inf
    assert flash.merge(parts, sums).item() == 1.0


def test_a_sum_by_pairs_is_a_sum_and_zeros_behind_it_change_no_bit():
    x = torch.randn(3, 13, 2, 5)
    total = flash.add_up(x)
    torch.testing.assert_close(total, x.sum(1), atol=1e-5, rtol=0)
    for more in (1, 3, 4, 50):
        longer = torch.cat((x, torch.zeros(3, more, 2, 5)), 1)
        assert torch.equal(flash.add_up(longer), total)
    assert not torch.equal(torch.cat((x, torch.zeros(3, 50, 2, 5)), 1).sum(1), total)


def test_this_torch_has_the_operator_as_it_is_called():
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    names = [argument.name for argument in arguments]
    by_place = "query key value cum_seq_q cum_seq_k max_q max_k".split()
    assert names[: len(by_place)] == by_place
    assert {"dropout_p", "is_causal", "return_debug_mask", "seqused_k"} <= {*names}


def test_on_a_cpu_the_fastest_form_is_the_fused_one():
    fastest = partial(flash.fastest, torch.device("cpu"), torch.bfloat16, 64)
    assert fastest(128) is paged.fused


def test_the_form_of_a_fixed_shape_is_made_of_tensors_alone():
    assert flash.fixed_shape(flash.flash) is flash.by_pages
    assert flash.fixed_shape(paged.fused) is paged.gathered
