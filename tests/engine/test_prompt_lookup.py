import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama32.engine.prompt_lookup import LookupDrafter, NgramIndex, PromptLookup
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings
from tests.checkpoints import tiny_config


def make_request(prompt, output=()) -> Request:
    return Request(prompt=list(prompt), max_length=1000, output=list(output))


def make_drafter(**options) -> LookupDrafter:
    return PromptLookup(**options).drafter(tiny_config(), EngineSettings())


def propose(request: Request, count: int = 4, **options) -> list[int]:
    return [*make_drafter(**options).propose({request: count})[request]]


def searched(tokens: list[int], sizes: range, count: int) -> list[int]:
    """Return the same continuation by a search through the whole text."""
    for size in sizes:
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                period = tokens[start + size :]
                return [period[i % len(period)] for i in range(count)]
    return []


def test_it_proposes_what_followed_the_last_tokens_before():
    assert propose(make_request([1, 2, 3, 4, 5, 6, 7, 9, 2, 3])) == [4, 5, 6, 7]
    assert propose(make_request([1, 2, 3, 4, 5], [6, 7, 8, 2, 3])) == [4, 5, 6, 7]
    assert propose(make_request([1], [2, 3, 4, 5, 2, 3])) == [4, 5, 2, 3]


def test_of_several_places_it_takes_the_latest():
    assert propose(make_request([2, 3, 4, 0, 2, 3, 5, 0, 2, 3]), 2) == [5, 0]


def test_of_several_sizes_it_takes_the_longest():
    text = [1, 2, 3, 4, 0, 2, 3, 5, 0, 1, 2, 3]
    assert propose(make_request(text), 1) == [4]
    assert propose(make_request(text), 1, max_ngram=2) == [5]


def test_where_nothing_as_long_has_occurred_it_proposes_nothing():
    request = make_request([1, 2, 3, 4, 2])
    assert propose(request) == []
    assert propose(request, min_ngram=1) == [3, 4, 2, 3]
    assert propose(make_request([1])) == []


def test_what_runs_into_the_end_goes_on_with_itself():
    assert propose(make_request([5, 1, 2, 1, 2, 1, 2]), 5) == [1, 2, 1, 2, 1]
    assert propose(make_request([7, 7, 7]), 4) == [7, 7, 7, 7]


def test_it_keeps_up_with_the_output():
    drafter = make_drafter()
    request = make_request([1, 2, 3, 4])
    assert drafter.propose({request: 2}) == {request: []}
    request.output += [9, 1]
    assert drafter.propose({request: 2}) == {request: []}
    request.output += [2, 3]
    assert drafter.propose({request: 2}) == {request: [4, 9]}


def test_every_request_has_a_text_of_its_own_until_it_is_released():
    drafter = make_drafter()
    first, second = make_request([1, 2, 3, 1, 2]), make_request([1, 2, 4, 1, 2])
    assert drafter.propose({first: 1, second: 1}) == {first: [3], second: [4]}
    drafter.release(first)
    assert drafter._indexes.keys() == {second}
    drafter.release(first)
    assert drafter.propose({first: 1}) == {first: [3]}


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_it_finds_what_a_search_finds(tokens, cuts, smallest, more):
    sizes = range(smallest + more, smallest - 1, -1)
    text = NgramIndex(sizes)
    while tokens:
        n = cuts[0]
        cuts = [*cuts[1:], n]
        text.extend(tokens[:n])
        tokens = tokens[n:]
        assert text.continuation(6) == searched(text.tokens, sizes, 6)


def test_a_step_reads_of_a_long_text_what_is_new(monkeypatch):
    read, extend = [], NgramIndex.extend
    monkeypatch.setattr(
        NgramIndex, "extend", lambda text, more: read.append(len(more)) or extend(text, more)
    )
    drafter = make_drafter()
    request = make_request(range(8000))
    for new in (0, 1, 5, 1):
        request.output += [7] * new
        drafter.propose({request: 8})
    assert read == [8000, 1, 5, 1]


@pytest.mark.parametrize("name", ["max_ngram", "min_ngram", "num_tokens"])
def test_a_count_below_one_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"PromptLookup: {name} is 0, allowed: 1 or more"):
        PromptLookup(**{name: 0})


def test_the_smallest_size_is_not_above_the_largest():
    with pytest.raises(ValueError, match="min_ngram is 4, above max_ngram, 3"):
        PromptLookup(min_ngram=4)
    assert PromptLookup(min_ngram=3).min_ngram == 3


def test_it_takes_no_memory_of_the_cache():
    assert PromptLookup().bytes_per_token == 0
