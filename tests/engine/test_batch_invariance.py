from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llama32.cache.batch import Span
from llama32.cache.paged_attention import QUERY_TILE
from llama32.engine.batch_invariance import (
    CallPlanner,
    RowCountProbe,
    attend_to_self,
    padded_to,
    padded_to_agreeing,
    plan_rows,
    round_up,
    split_span,
    unpadded,
)
from llama32.model import Block, Llama
from tests.checkpoints import random_model, tiny_config

# Every row is whole vectors of a CPU: what is left over at the end may be computed otherwise.
CONFIG = tiny_config(
    vocab_size=192,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
SIZES = [1, 8, 64]


class CountsRows(Block):
    """A layer whose last bits depend on the number of rows."""

    def forward(self, x, by, attend):
        return super().forward(x, by, attend) * (1 + len(x) * 2**-20)


class MindsPlace(Block):
    """A layer whose last bits depend on the place of a row."""

    def forward(self, x, by, attend):
        return super().forward(x, by, attend) * (1 + torch.arange(len(x)).unsqueeze(1) * 2**-20)


class CountingHead(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1 + len(x) * 2**-20)


class FakeProbe(RowCountProbe):
    """A probe with given answers: only the given counts agree."""

    def __init__(self, canonical: int, *agreeing: int) -> None:
        self.canonical = canonical
        self.agreeing = agreeing

    def agrees(self, rows: int) -> bool:
        return rows in self.agreeing


def make_model(middle: type[Block] = Block) -> Llama:
    """Return a model of three layers; the middle layer may be of a different class."""
    model = random_model(CONFIG)
    other = middle(CONFIG)
    other.load_state_dict(model.layers[1].state_dict())
    model.layers[1] = other
    return model


def with_counting_head() -> Llama:
    model = make_model()
    model.lm_head = CountingHead(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)
    return model


def make_span(start: int, length: int, name: int = 0) -> Span:
    """Return a span whose tokens equal their positions."""
    return Span(list(range(start, start + length)), start, [name])


def singles(n: int) -> list[Span]:
    return [make_span(10 * i, 1, i) for i in range(n)]


def cut(rows: CallPlanner, spans: Sequence[Span]) -> list[tuple[list[int], int]]:
    """Return the span lengths and the row count of each call."""
    return [([len(span.tokens) for span in part], n) for part, n in rows.calls(spans)]


def joined(calls: Sequence[tuple[Sequence[Span], int]]) -> list[Span]:
    """Return the spans of all calls, with split spans rejoined."""
    whole: list[Span] = []
    for span in (span for part, _ in calls for span in part):
        if whole and whole[-1].pages == span.pages:
            before = whole.pop()
            assert before.length == span.start
            span = Span([*before.tokens, *span.tokens], before.start, span.pages)
        whole.append(span)
    return whole


def stubborn(canonical: int) -> CallPlanner:
    """Return a planner whose candidates never agree."""
    return CallPlanner(lambda n: [n, n + 1], canonical, lambda rows: False)


ANY_SPANS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 300)), max_size=8).map(
    lambda cuts: [make_span(*cut, name) for name, cut in enumerate(cuts)]
)
ANY_ROWS = st.builds(
    lambda canonical, some: CallPlanner(lambda n: [n, n + 3], canonical, lambda n: n % 5 in some),
    st.sampled_from([QUERY_TILE, 100, 512]),
    st.sets(st.integers(0, 4)),
)


@given(ANY_SPANS, ANY_ROWS)
@settings(deadline=None)
def test_spans_come_back_in_order_and_whole(spans, rows):
    assert joined(list(rows.calls(spans))) == spans


@given(ANY_SPANS, ANY_ROWS)
@settings(deadline=None)
def test_there_are_rows_for_all_tokens_of_a_call_and_no_call_is_empty(spans, rows):
    for lengths, n in cut(rows, spans):
        assert 0 < sum(lengths) <= n


@given(ANY_SPANS, st.sampled_from([QUERY_TILE, 100, 512]))
@settings(deadline=None)
def test_where_no_candidate_agrees_all_calls_have_the_canonical_rows(spans, canonical):
    assert {n for _, n in stubborn(canonical).calls(spans)} <= {canonical}


@given(ANY_SPANS, st.sampled_from([QUERY_TILE, 100, 512]))
@settings(deadline=None)
def test_spans_are_split_only_where_attention_would_cut_them(spans, canonical):
    borders = {(name, n) for name, span in enumerate(spans) for n in (span.start, span.length)}
    for part, _ in stubborn(canonical).calls(spans):
        for span in part:
            for n in (span.start, span.length):
                assert n % QUERY_TILE == 0 or (span.pages[0], n) in borders


@pytest.mark.parametrize(
    ("start", "length", "pieces"),
    [
        (0, 1, [(0, 1)]),
        (0, 64, [(0, 64)]),
        (0, 65, [(0, 64), (64, 65)]),
        (63, 2, [(63, 64), (64, 65)]),
        (10, 150, [(10, 64), (64, 128), (128, 160)]),
        (128, 64, [(128, 192)]),
    ],
)
def test_a_span_is_split_at_multiples_of_the_block(start, length, pieces):
    assert QUERY_TILE == 64
    parts = list(split_span(make_span(start, length, 5)))
    assert parts == [make_span(start, stop - start, 5) for start, stop in pieces]


def test_calls_are_filled_before_another_begins():
    spans = [make_span(0, n, n) for n in (40, 20, 5, 150, 30)]
    assert cut(stubborn(64), spans) == [
        ([40, 20], 64),
        ([5], 64),
        ([64], 64),
        ([64], 64),
        ([22, 30], 64),
    ]
    assert cut(stubborn(128), spans) == [([40, 20, 5], 128), ([64, 64], 128), ([22, 30], 128)]


def test_without_spans_there_is_no_call():
    for rows in (unpadded(), padded_to(SIZES), stubborn(64), padded_to_agreeing(FakeProbe(64, 64))):
        assert list(rows.calls([])) == []


def test_the_first_candidate_that_agrees_takes_all_spans_unsplit():
    spans = [make_span(0, 100, 0), make_span(7, 300, 1)]
    tried = []

    def agrees(rows: int) -> bool:
        tried.append(rows)
        return rows >= 420

    rows = CallPlanner(lambda n: [n, n + 20, n + 40], 64, agrees)
    assert list(rows.calls(spans)) == [(spans, 420)]
    assert tried == [400, 420]


def test_free_rows_are_as_many_as_the_tokens():
    spans = [make_span(0, 100, 0), make_span(7, 301, 1)]
    assert list(unpadded().calls(spans)) == [(spans, 401)]


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (2, 8), (8, 8), (9, 64), (64, 64)])
def test_fixed_rows_are_the_smallest_size_that_is_enough(n, rows):
    assert cut(padded_to(SIZES), singles(n)) == [([1] * n, rows)]


def test_more_tokens_than_the_largest_size_go_in_several_calls_of_it():
    assert cut(padded_to(SIZES), singles(130)) == [([1] * 64, 64), ([1] * 64, 64), ([1] * 2, 64)]


@pytest.mark.parametrize(
    ("n", "tried"),
    [
        (1, [1, 2, 4, 64]),
        (3, [3, 4, 4, 64]),
        (7, [7, 8, 8, 64]),
        (9, [16, 64]),
        (63, [64, 64]),
        (65, [72, 128]),
    ],
)
def test_few_rows_are_tried_as_they_are_then_by_twos_and_fours_and_more_by_eights(n, tried):
    assert list(padded_to_agreeing(FakeProbe(64)).candidates(n)) == tried


def test_rows_are_padded_to_a_count_that_is_proven():
    assert cut(padded_to_agreeing(FakeProbe(64, 16)), singles(10)) == [([1] * 10, 16)]
    assert cut(padded_to_agreeing(FakeProbe(64, 64)), singles(10)) == [([1] * 10, 64)]
    assert cut(padded_to_agreeing(FakeProbe(64, 64)), singles(100)) == [
        ([1] * 64, 64),
        ([1] * 36, 64),
    ]
    assert cut(padded_to_agreeing(FakeProbe(64, 64, 128)), singles(100)) == [([1] * 100, 128)]


@pytest.mark.parametrize(("n", "up"), [(0, 0), (1, 8), (8, 8), (9, 16), (17, 24)])
def test_a_number_is_rounded_up_to_the_next_multiple(n, up):
    assert round_up(n, 8) == up


def watch_layers(model: Llama) -> list[nn.Module]:
    """Return a list that collects the layers called from now on."""
    called: list[nn.Module] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    return called


def test_a_count_is_tried_once():
    model = make_model()
    probe = RowCountProbe(model, 8, has_head=True)
    called = watch_layers(model)
    first = [probe.agrees(rows) for rows in (1, 3, 8, 20)]
    count = len(called)
    assert count > 0
    assert [probe.agrees(rows) for rows in (1, 3, 8, 20)] == first
    assert len(called) == count


def test_of_layers_that_are_alike_one_is_tried_and_of_others_each():
    model = make_model(CountsRows)
    called = watch_layers(model)
    RowCountProbe(model, 8, has_head=False).agrees(4)
    assert model.layers[1] in called
    assert len({*called}) == 2


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 64}, {"num_attention_heads": 2}], ids=["mlp", "heads"]
)
def test_a_layer_of_other_sizes_is_tried_besides(changes):
    model = make_model()
    model.layers[1] = Block(replace(CONFIG, **changes))
    called = watch_layers(model)
    RowCountProbe(model, 8, has_head=False).agrees(4)
    assert model.layers[1] in called
    assert len({*called}) == 2


def test_a_layer_in_another_dtype_is_tried_besides():
    model = make_model()
    model.layers[1].mlp.down_proj.double()
    model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: args[0].double())
    called = watch_layers(model)
    RowCountProbe(model, 8, has_head=False).agrees(4)
    assert model.layers[1] in called
    assert len({*called}) == 2


@pytest.mark.parametrize("has_head", [False, True])
def test_one_layer_that_counts_its_rows_agrees_with_nothing_but_the_canonical_count(has_head):
    probe = RowCountProbe(make_model(CountsRows), 8, has_head=has_head)
    assert [rows for rows in range(1, 40) if probe.agrees(rows)] == [8]


@pytest.mark.parametrize("has_head", [False, True])
def test_where_one_layer_minds_the_place_of_a_row_not_even_the_canonical_count_agrees(has_head):
    probe = RowCountProbe(make_model(MindsPlace), 8, has_head=has_head)
    assert not probe.agrees(8)


def test_the_unembedding_is_tried_where_logits_are_wanted():
    counting, plain = with_counting_head(), make_model()
    probe = RowCountProbe(counting, 8, has_head=True)
    assert [rows for rows in range(1, 40) if probe.agrees(rows)] == [8]
    without, as_before = (RowCountProbe(model, 8, has_head=False) for model in (counting, plain))
    for rows in range(1, 40):
        assert without.agrees(rows) == as_before.agrees(rows)


@torch.inference_mode()
def computed(model: Llama, tokens: Tensor, positions: Tensor, has_head: bool) -> list[Tensor]:
    """Return the keys and values of every layer, and the logits."""
    left: list[Tensor] = []

    def attend(q, k, v):
        left.extend((k, v))
        return attend_to_self(q, k, v)

    logits = model(tokens, positions, attend=attend)
    return [*left, logits] if has_head else left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("canonical", "has_head"), [(64, False), (8, True)])
def test_rows_of_a_count_that_agrees_leave_the_whole_model_with_the_canonical_bits(
    dtype, canonical, has_head
):
    model = make_model().to(dtype)
    probe = RowCountProbe(model, canonical, has_head=has_head)
    for rows in filter(probe.agrees, range(1, 81)):
        draw = torch.Generator().manual_seed(rows)
        shape = (round_up(rows, canonical),)
        tokens = torch.randint(CONFIG.vocab_size, shape, generator=draw)
        positions = torch.randint(5000, shape, generator=draw)
        parts = zip(tokens.split(canonical), positions.split(canonical), strict=True)
        expected = zip(*(computed(model, *part, has_head) for part in parts), strict=True)
        found = computed(model, tokens[:rows], positions[:rows], has_head)
        for x, pieces in zip(found, expected, strict=True):
            assert torch.equal(x, torch.cat(pieces)[:rows]), rows


def test_determinism_is_refused_where_the_place_of_a_row_matters():
    match = "deterministic: on cpu in torch.float32 the bits of a row depend on its place"
    with pytest.raises(ValueError, match=match):
        plan_rows(make_model(MindsPlace), True, [])


@pytest.mark.parametrize("middle", [MindsPlace, CountsRows])
def test_where_determinism_is_not_free_nobody_gets_it_unasked(middle):
    prompts, decode, deterministic = plan_rows(make_model(middle), None, [])
    assert deterministic is False
    assert cut(prompts, [make_span(0, 100)]) == [([100], 100)]
    assert cut(decode, singles(5)) == [([1] * 5, 5)]


def test_determinism_that_is_asked_for_pads_and_splits():
    prompts, decode, deterministic = plan_rows(make_model(CountsRows), True, [])
    assert deterministic is True
    assert cut(prompts, [make_span(0, 100)]) == [([64], 64), ([36], 64)]
    assert cut(decode, singles(5)) == [([1] * 5, 8)]
    assert cut(decode, singles(9)) == [([1] * 8, 8), ([1], 8)]


def test_logits_are_wanted_of_decoding_only():
    prompts, decode, _ = plan_rows(with_counting_head(), True, [])
    as_before, _, _ = plan_rows(make_model(), True, [])
    assert [rows for rows in range(1, 40) if decode.agrees(rows)] == [8]
    for rows in range(1, 140):
        assert prompts.agrees(rows) == as_before.agrees(rows)


def test_determinism_that_is_free_is_taken(monkeypatch):
    monkeypatch.setattr(RowCountProbe, "_compare", lambda probe, rows: True)
    prompts, decode, deterministic = plan_rows(make_model(), None, [])
    assert deterministic is True
    assert cut(prompts, [make_span(0, 100)]) == [([100], 104)]
    assert cut(decode, singles(5)) == [([1] * 5, 5)]


def test_determinism_is_not_free_where_one_row_alone_needs_padding(monkeypatch):
    monkeypatch.setattr(RowCountProbe, "_compare", lambda probe, rows: rows > 1)
    assert plan_rows(make_model(), None, [])[2] is False
    assert plan_rows(make_model(), True, [])[2] is True


def test_who_wants_no_determinism_pays_for_no_trial():
    model = make_model()
    called = watch_layers(model)
    prompts, decode, deterministic = plan_rows(model, False, [])
    assert deterministic is False
    assert cut(prompts, [make_span(0, 100)]) == [([100], 100)]
    assert cut(decode, singles(5)) == [([1] * 5, 5)]
    assert called == []


def test_where_decoding_has_few_sizes_determinism_is_to_have_only_the_largest():
    _, decode, _ = plan_rows(make_model(), False, SIZES)
    assert [cut(decode, singles(n))[0][1] for n in (1, 5, 9)] == [1, 8, 64]
    _, decode, deterministic = plan_rows(make_model(), True, SIZES)
    assert deterministic is True
    assert [cut(decode, singles(n))[0][1] for n in (1, 5, 9)] == [64, 64, 64]
