"""Stop strings in streamed text: no text lost, none shown too early."""

import random

import pytest

from llama32.text.stop_strings import StopStrings


def shown(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    """Return the text shown after each piece and at the end, and the stop string that was hit."""
    stopping = StopStrings(stops)
    return [*map(stopping.push, pieces), stopping.flush()], stopping.hit


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the first stop string to end (the longest of equals): the oracle."""
    matches = [(i + len(stop), i, stop) for stop in stops if (i := text.find(stop)) >= 0]
    if not matches:
        return text, None
    _, start, stop = min(matches)
    return text[:start], stop


def random_pieces(rng: random.Random, text: str) -> list[str]:
    borders = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 8)))
    return [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]


def random_case(rng: random.Random) -> tuple[str, list[str]]:
    letters = rng.choice(["ab", "abc", "é€"])
    text = "".join(rng.choices(letters, k=rng.randint(0, 30)))
    stops = ["".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(rng.randint(0, 4))]
    return text, stops


def test_a_stop_string_across_token_borders_ends_the_text():
    assert shown(["Hello", " W", "or", "ld", " again"], ["World"]) == (
        ["Hello", " ", "", "", "", ""],
        "World",
    )


def test_a_beginning_without_an_end_is_shown_later():
    assert shown(["a<|", "en", "ding"], ["<|end|>"]) == (["a", "", "<|ending", ""], None)
    assert shown(["aab", "aa", "x"], ["aabaac"]) == (["", "", "aabaax", ""], None)


def test_held_text_is_shown_when_the_text_ends():
    assert shown(["one st"], ["stop"]) == (["one ", "st"], None)


def test_without_stop_strings_nothing_is_held_back():
    assert shown(["a", "", "bc"], []) == (["a", "", "bc", ""], None)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("xabcdy", ["abcd", "bc"], ("xa", "bc")),  # bc ends first
        ("xabcdy", ["cd", "bcd"], ("xa", "bcd")),  # both end together: the longer one
        ("xabay", ["aba", "ab"], ("x", "ab")),  # the shorter one is complete first
        ("xaby", ["y", "b"], ("xa", "b")),  # not the order of the list
    ],
)
def test_of_two_stop_strings_the_first_to_end_counts_then_the_longer(text, stops, expected):
    for pieces in ([text], list(text)):
        parts, hit = shown(pieces, stops)
        assert ("".join(parts), hit) == expected


def test_nothing_is_shown_after_a_hit():
    stopping = StopStrings(["b"])
    assert stopping.push("ab and more") == "a"
    assert stopping.push("more") == ""
    assert stopping.flush() == ""
    assert stopping.hit == "b"


def test_the_output_does_not_depend_on_the_pieces():
    rng = random.Random(0)
    hits = 0
    for _ in range(3000):
        text, stops = random_case(rng)
        expected = cut(text, stops)
        hits += expected[1] is not None
        for pieces in ([text], list(text), random_pieces(rng, text)):
            parts, hit = shown(pieces, stops)
            assert ("".join(parts), hit) == expected, (pieces, stops)
    assert 500 < hits < 2800


def test_exactly_the_longest_tail_that_could_begin_a_stop_string_is_held_back():
    rng = random.Random(1)
    for _ in range(1000):
        text, stops = random_case(rng)
        if cut(text, stops)[1] is not None:
            continue
        starts = {stop[:n] for stop in stops for n in range(len(stop))}
        held = next((text[i:] for i in range(len(text)) if text[i:] in starts), "")
        *parts, rest = shown(random_pieces(rng, text), stops)[0]
        assert rest == held
        assert "".join(parts) == text.removesuffix(held)
