from itertools import islice

import pytest
import torch

from llama32.train.data import (
    IGNORE_INDEX,
    Example,
    collate,
    num_steps,
    pack_rows,
    packed_batches,
    shift,
    shuffle_and_concat,
    split_rows,
    text_batches,
)

EXAMPLES = [
    Example([100 * i + j for j in range(2 + i % 9)], [False, *[True] * (1 + i % 9)])
    for i in range(60)
]


def test_shuffling_loses_nothing_and_depends_only_on_the_seed():
    documents = [[i, i + 100, i + 200] for i in range(20)]
    tokens = shuffle_and_concat(documents, seed=3)
    assert sorted(tokens.unflatten(0, (20, 3)).tolist()) == documents
    assert torch.equal(tokens, shuffle_and_concat(documents, seed=3))
    assert not torch.equal(tokens, shuffle_and_concat(documents, seed=4))


def test_text_is_cut_into_rows_and_the_last_target_begins_the_next_row():
    tokens, targets, lengths = shift(split_rows(torch.arange(50), 16, offset=1))
    assert tokens.shape == targets.shape == (3, 16)
    assert lengths is None
    assert torch.equal(targets, tokens + 1)
    assert targets[0, -1] == tokens[1, 0]


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="10 tokens do not fill a row of 16"):
        split_rows(torch.arange(10), 16)


def as_lists(data, steps: int, first: int = 0) -> list:
    """Tokens and targets of some steps, as plain lists."""
    batches = islice(data(first), steps)
    return [[[x.tolist() for x in part[:2]] for part in batch] for batch in batches]


@pytest.mark.parametrize("kind", ["text", "packed"])
def test_starting_at_any_step_gives_the_same_batches(kind):
    data = {
        "text": text_batches(lambda epoch: torch.arange(120) + 1000 * epoch, context=16, batch=2),
        "packed": packed_batches(EXAMPLES, context=32, batch=3, micro_batch=2),
    }[kind]
    whole = as_lists(data, 12)
    for first in range(12):
        assert as_lists(data, 12 - first, first) == whole[first:]
    assert len({str(step) for step in whole}) == 12


def test_documents_fill_rows_without_loss_and_differently_in_each_epoch():
    epochs = [pack_rows(EXAMPLES, 24, seed=0, epoch=epoch) for epoch in range(2)]
    for rows in epochs:
        assert sorted(example for row in rows for example in row) == sorted(EXAMPLES)
        lengths = [sum(len(example.ids) for example in row) for row in rows]
        assert max(lengths) <= 24
        assert sum(lengths) / (24 * len(rows)) > 0.9
    assert epochs[0] != epochs[1]
    assert epochs[0] != pack_rows(EXAMPLES, 24, seed=1, epoch=0)


def test_the_number_of_steps_covers_all_rows():
    rows = sum(len(pack_rows(EXAMPLES, 24, seed=0, epoch=epoch)) for epoch in range(3))
    assert num_steps(EXAMPLES, 24, batch=4, epochs=3) == -(-rows // 4)


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"a document of . tokens, a context of 8"):
        pack_rows(EXAMPLES, 8, seed=0, epoch=0)


def test_a_target_is_the_next_token_of_the_same_document_if_the_mask_selects_it():
    first = Example([1, 2, 3, 4], [False, False, True, True])
    second = Example([5, 6, 7], [True, True, False])
    batch = collate([first, second])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.targets.tolist() == [
        IGNORE_INDEX,
        3,
        4,
        IGNORE_INDEX,
        6,
        IGNORE_INDEX,
        IGNORE_INDEX,
    ]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.lengths == (4, 3)
    assert batch.num_targets == 3
