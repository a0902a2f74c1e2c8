"""Spans to tensors."""

import pytest
import torch

from llama32.cache.batch import Batch, Span


def test_spans_become_packed_tensors():
    prefill = Span(tokens=[5, 6, 7], start=0, pages=[4])
    later = Span(tokens=[8, 9], start=3, pages=[2, 0])
    batch = Batch.pack([prefill, later], page_size=4)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.slots.tolist() == [16, 17, 18, 2 * 4 + 3, 0]
    assert batch.last_tokens.tolist() == [2, 4]
    assert batch.query_starts.tolist() == [0, 3, 5]
    assert batch.lengths.tolist() == [3, 5]
    assert batch.page_table.tolist() == [[4, 0], [2, 0]]
    assert batch.page_table.dtype == batch.lengths.dtype == torch.int32


def test_padding_rows_write_to_the_padding_page():
    spans = [Span([5, 6], 0, [4]), Span([7], 5, [2, 3])]
    batch = Batch.pack(spans, page_size=4, num_rows=5, padding_page=9)
    assert batch.tokens.tolist() == [5, 6, 7, 0, 0]
    assert batch.positions.tolist() == [0, 1, 5, 0, 0]
    assert batch.slots.tolist() == [16, 17, 13, 36, 36]
    assert batch.last_tokens.tolist() == [1, 2]
    assert batch.query_starts.tolist() == [0, 2, 3]
    assert batch.page_table.tolist() == [[4, 9], [2, 3]]
    assert (batch.max_query, batch.max_length) == (2, 6)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="3 tokens do not fit into 2 rows"):
        Batch.pack([Span([5, 6, 7], 0, [4])], page_size=4, num_rows=2)


def test_a_sequence_of_adjacent_pages_is_read_in_place():
    spans = [Span([1], 6, [2, 3]), Span([1], 6, [3, 2]), Span([1], 2, [3, 2])]
    adjacent, scattered, first_page = Batch.pack(spans, page_size=4).kv_locations
    assert adjacent == slice(8, 15)
    assert scattered.tolist() == [3, 2]
    assert first_page == slice(12, 15)


@pytest.mark.parametrize("spans", [[], [Span([1], 0, [0]), Span([], 4, [1])]], ids=len)
def test_a_span_without_new_tokens_is_refused(spans):
    with pytest.raises(ValueError, match="at least one new token"):
        Batch.pack(spans, page_size=4)


def test_a_token_beyond_the_pages_raises_and_takes_no_slot_of_another_sequence():
    with pytest.raises(IndexError):
        Batch.pack([Span([1, 2], 3, [0])], page_size=4)
