"""Requests for the training of `tiny`, made from stories alone."""

import random
import sys
from pathlib import Path

import pytest

WEIGHTS = Path(__file__).parents[2] / "weights"


@pytest.fixture
def requests(monkeypatch):
    monkeypatch.syspath_prepend(str(WEIGHTS))
    from requests_from_stories import Requests

    yield Requests(STORIES)
    sys.modules.pop("requests_from_stories")


STORIES = [
    f"One day, {'an' if animal == 'owl' else 'a'} {animal} found a {toy}. The {adjective} {animal} "
    f"ran. The {animal} was very {adjective}. A {toy} is fun. The {toy} was red."
    for adjective in ("happy", "big", "sad")
    for animal in ("dog", "owl", "cat", "mouse", "bird", "frog", "lion")
    for toy in ("ball", "box", "kite", "drum", "boat", "book", "cake")
]


def test_nouns_are_found_by_the_words_around(requests):
    assert {"dog", "owl", "ball", "kite"} <= requests.nouns
    assert not {"happy", "big", "sad", "red", "fun"} & requests.nouns


def test_a_request_names_the_subjects_with_articles(requests):
    story = "A happy owl found a kite. The owl was happy. The kite flew and the owl ran."
    phrasings = {requests.ask(story, random.Random(seed)) for seed in range(30)}
    assert "Tell me a story about an owl and a kite." in phrasings
    assert all("an owl" in request for request in phrasings)


def test_some_requests_use_names(requests):
    story = "There was a dog named Max. The dog was sad."
    phrasings = {requests.ask(story, random.Random(seed)) for seed in range(60)}
    assert "Tell me a story about a dog named Max." in phrasings
    assert "Tell me a story about a dog." in phrasings


def test_a_second_request_is_worded_as_such(requests):
    phrasings = {requests.ask(STORIES[0], random.Random(seed), again=True) for seed in range(30)}
    assert "Now tell me a story about a dog and a ball." in phrasings


def test_a_story_without_known_nouns_gets_a_request(requests):
    assert requests.ask("It rained.", random.Random(0)) == "Tell me a story."
