from itertools import islice

import pytest
import torch

from llama32.train.data import (
    IGNORED,
    Example,
    cut,
    fill,
    num_steps,
    packed,
    predicting,
    shuffled,
    text_rows,
    together,
)

EXAMPLES = [
    Example([100 * i + j for j in range(2 + i % 9)], [False, *[True] * (1 + i % 9)])
    for i in range(60)
]


def test_shuffling_loses_nothing_and_depends_on_the_seed_alone():
    documents = [[i, i + 100, i + 200] for i in range(20)]
    found = shuffled(documents, seed=3)
    assert sorted(found.unflatten(0, (20, 3)).tolist()) == documents
    assert torch.equal(found, shuffled(documents, seed=3))
    assert not torch.equal(found, shuffled(documents, seed=4))


def test_text_is_cut_into_rows_whose_last_target_begins_the_next():
    tokens, targets, lengths = predicting(cut(torch.arange(50), 16, offset=1))
    assert tokens.shape == targets.shape == (3, 16)
    assert lengths is None
    assert torch.equal(targets, tokens + 1)
    assert targets[0, -1] == tokens[1, 0]


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="10 tokens do not fill a row of 16"):
        cut(torch.arange(10), 16)


def seen(data, steps: int, first: int = 0) -> list:
    """What the steps ask for, as plain lists."""
    taken = islice(data(first), steps)
    return [[[x.tolist() for x in batch[:2]] for batch in step] for step in taken]


@pytest.mark.parametrize("kind", ["text", "packed"])
def test_from_any_step_on_the_same_steps_come(kind):
    data = {
        "text": text_rows(lambda epoch: torch.arange(120) + 1000 * epoch, context=16, batch=2),
        "packed": packed(EXAMPLES, context=32, batch=3, at_once=2),
    }[kind]
    whole = seen(data, 12)
    for first in range(12):
        assert seen(data, 12 - first, first) == whole[first:]
    assert len({str(step) for step in whole}) == 12


def test_documents_fill_rows_without_loss_and_each_epoch_anew():
    epochs = [fill(EXAMPLES, 24, seed=0, epoch=epoch) for epoch in range(2)]
    for rows in epochs:
        assert sorted(example for row in rows for example in row) == sorted(EXAMPLES)
        lengths = [sum(len(example.ids) for example in row) for row in rows]
        assert max(lengths) <= 24
        assert sum(lengths) / (24 * len(rows)) > 0.9
    assert epochs[0] != epochs[1]
    assert epochs[0] != fill(EXAMPLES, 24, seed=1, epoch=0)


def test_an_epoch_is_as_many_steps_as_its_rows_need():
    rows = sum(len(fill(EXAMPLES, 24, seed=0, epoch=epoch)) for epoch in range(3))
    assert num_steps(EXAMPLES, 24, batch=4, epochs=3) == -(-rows // 4)


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"a document of . tokens, a context of 8"):
        fill(EXAMPLES, 8, seed=0, epoch=0)


def test_a_target_is_the_next_token_of_the_same_document_where_it_is_to_be_learned():
    first = Example([1, 2, 3, 4], [False, False, True, True])
    second = Example([5, 6, 7], [True, True, False])
    batch = together([first, second])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.targets.tolist() == [IGNORED, 3, 4, IGNORED, 6, IGNORED, IGNORED]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.lengths == (4, 3)
    assert batch.num_targets == 3
