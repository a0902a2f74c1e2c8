"""Tool calls in streamed text, and the problems of broken calls."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama32.text.tool_calls import ToolCallBuffer, parse_calls

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
    '{"name": "f"}': "a call must have a name and parameters, and nothing else",
    '{"name": "f", "parameters": 5}': "the parameters of a call must be an object",
    '{"name": "", "parameters": {}}': "the name of a call must be a text",
    '{"type": "tool", "name": "f", "parameters": {}}': "the type of a call must be function",
    F[:-1]: "Expecting ',' delimiter: line 1 column 37 (char 36)",
    "[f(1)]": "an argument has no name",
    "[f(x=y)]": "malformed node or string on line 1",
    "[f(x=1), 5]": "a list of calls holds something else",
    "[f(": "'(' was never closed",
}


def shown(text: str, cuts: list[int], **options: bool) -> tuple[list[str], str]:
    """Return the text shown after each piece, and the held text at the end."""
    buffer = ToolCallBuffer(**options)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    return [buffer.push(piece) for piece in pieces], buffer.flush()


@pytest.mark.parametrize("text", CALLS)
def test_no_part_of_a_call_is_shown(text):
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


def test_text_is_shown_as_soon_as_no_call_can_follow():
    buffer = ToolCallBuffer()
    assert [buffer.push(piece) for piece in ("[", "1", ", 2]", " [f(")] == [
        "",
        "[1",
        ", 2]",
        " [f(",
    ]
    buffer = ToolCallBuffer()
    assert [buffer.push(piece) for piece in ("\n", "Hi", " {")] == ["", "\nHi", " {"]
    buffer = ToolCallBuffer()
    assert [buffer.push(piece) for piece in ('{"na', "ti", "on")] == ["", '{"nati', "on"]


def test_behind_the_python_tag_nothing_is_shown():
    assert shown("print(1)", [3], is_call=True) == (["", ""], "print(1)")


@given(st.text(alphabet='[]{}(),:="\\ \n.fname1', max_size=40), st.lists(st.integers(0, 39)))
@settings(deadline=None)
def test_no_text_is_lost_in_any_split(text, cuts):
    pieces, rest = shown(text, cuts)
    assert "".join(pieces) + rest == text
    if parse_calls(text)[0]:
        assert not any(pieces)


def test_pieces_of_a_certain_call_are_not_matched_again():
    buffer = ToolCallBuffer()
    buffer.push('{"name": "f", "parameters": {"x": "')
    assert buffer._is_call  # no more matching from here on
    assert buffer.push("a" * 10) == ""


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_has_a_problem(text):
    calls, problem = parse_calls(text)
    assert calls == []
    assert problem is not None
    assert problem.startswith("begins like a tool call, but cannot be parsed: ")
    assert BROKEN[text] in problem


@pytest.mark.parametrize("text", [*TEXTS, *CALLS, "5", "{}", "[[1]]"])
def test_calls_and_other_texts_have_no_problem(text):
    assert parse_calls(text)[1] is None
