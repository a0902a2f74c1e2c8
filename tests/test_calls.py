"""Tool calls in text that comes in pieces, and what is said of those that are broken."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama32.calls import HeldCalls, parse_calls

F = '{"name": "f", "parameters": {"x": 1}}'
CALLS = [F, f"\n [{F}, {F}]", f"{F}; {F}", "[f(x=1)]", " [ math.sqrt(x=2), g()]"]
CALLS += ['{"type": "function", "name": "f", "parameters": {}}']
TEXTS = [
    "Hello",
    "{x}",
    '{"city": "Rome"}',
    "[1, 2]",
    "[a link](url)",
    "[",
    "{",
    '{"na',
    "",
    " \n",
    "- [x] done",
]
BROKEN = {
    '{"name": "f"}': "a call has a name and parameters, and nothing else",
    '{"name": "f", "parameters": 5}': "its parameters are not an object",
    '{"name": "", "parameters": {}}': "its name is not a text",
    '{"type": "tool", "name": "f", "parameters": {}}': "its type is not function",
    F[:-1]: "Expecting ',' delimiter: line 1 column 37 (char 36)",
    "[f(1)]": "an argument has no name",
    "[f(x=y)]": "malformed node or string on line 1",
    "[f(x=1), 5]": "not all in the list are calls",
    "[f(": "'(' was never closed",
}


def shown(text: str, cuts: list[int], **given: bool) -> tuple[list[str], str]:
    """What a listener gets of a text in pieces, and what comes at its end."""
    held = HeldCalls(**given)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    return [held.push(piece) for piece in pieces], held.flush()


@pytest.mark.parametrize("text", CALLS)
def test_nothing_of_a_call_is_shown_before_its_end(text):
    assert parse_calls(text)[0]
    for seed in range(20):
        cuts = random.Random(seed).choices(range(len(text)), k=seed)
        pieces, rest = shown(text, cuts)
        assert set(pieces) <= {""}
        assert rest == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_shown_whole_and_in_order(text):
    for seed in range(20):
        cuts = random.Random(seed).choices(range(len(text) + 1), k=seed)
        pieces, rest = shown(text, cuts)
        assert "".join(pieces) + rest == text


def test_a_text_is_shown_as_soon_as_it_can_be_no_call():
    held = HeldCalls()
    assert [held.push(piece) for piece in ("[", "1", ", 2]", " [f(")] == ["", "[1", ", 2]", " [f("]
    held = HeldCalls()
    assert [held.push(piece) for piece in ("\n", "Hi", " {")] == ["", "\nHi", " {"]
    held = HeldCalls()
    assert [held.push(piece) for piece in ('{"na', "ti", "on")] == ["", '{"nati', "on"]


def test_behind_the_python_tag_nothing_is_shown():
    assert shown("print(1)", [3], is_call=True) == (["", ""], "print(1)")


@given(st.text(alphabet='[]{}(),:="\\ \n.fname1', max_size=40), st.lists(st.integers(0, 39)))
@settings(deadline=None)
def test_no_text_gets_lost_however_it_is_cut(text, cuts):
    pieces, rest = shown(text, cuts)
    assert "".join(pieces) + rest == text
    if parse_calls(text)[0]:
        assert not any(pieces)


def test_a_long_call_takes_no_time_for_each_of_its_pieces():
    held = HeldCalls()
    held.push('{"name": "f", "parameters": {"x": "')
    assert held._is_call  # from here on nothing is looked at
    assert held.push("a" * 10) == ""


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_says_why_it_is_none(text):
    calls, problem = parse_calls(text)
    assert calls == []
    assert problem is not None
    assert problem.startswith("begins like a tool call, but is none: ")
    assert BROKEN[text] in problem


@pytest.mark.parametrize("text", [*TEXTS, *CALLS, "5", "{}", "[[1]]"])
def test_nothing_is_said_of_calls_and_of_other_texts(text):
    assert parse_calls(text)[1] is None
