"""Make requests from stories: "Tell me a story about a dog and a ball."

The subjects of a story are found by counting, without a dictionary. Nouns are words that often
follow an article and seldom follow "very". Subjects are nouns that are frequent in the story and
rare in the collection (tf-idf).
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

ARTICLES = frozenset(("a", "an", "the"))
POSSESSIVES = frozenset(("his", "her", "their"))
INTENSIFIERS = frozenset(("very", "so", "too", "really", "feel", "felt", "more", "not"))
# A punctuation mark or one of these words follows a noun; a noun follows an adjective.
AFTER_NOUNS = frozenset(
    "about again all and as at because but by came could did fell for from had has he if in into "
    "is it it's looked my not of on one or ran said she so started that the their then there they "
    "to too until very was we went were when who with would you your".split()
)
VAGUE = frozenset(
    "back best both day end first idea it last lot moral most name next one only other part piece "
    "pieces rest same side something story sudden time top way while".split()
)
FIRST = (
    "Tell me a story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "I want a story about {}.",
    "A story about {}, please.",
)
AGAIN = ("Now tell me a story about {}.", "Tell me another story, about {}.", "And one about {}?")


class Requests:
    """The nouns of many stories, and requests for single stories."""

    def __init__(self, stories: Sequence[str]) -> None:
        self.num_stories = len(stories)
        self.stories_with = Counter(word for story in stories for word in set(_words(story)))
        uses, behind, noun_like, intense, counted = (Counter() for _ in range(5))
        self.articles: dict[str, Counter] = {}
        for story in stories:
            words = _words(story)
            for before, word, after in zip(words, words[1:], [*words[2:], "."], strict=False):
                uses[word] += 1
                intense[word] += before in INTENSIFIERS
                if before in ARTICLES | POSSESSIVES:
                    behind[word] += 1
                    noun_like[word] += not after.isalpha() or after in AFTER_NOUNS
                    counted[before, word] += 1
        self.counted = counted
        self.nouns = frozenset(
            word
            for word, n in behind.items()
            if n >= 8
            and word.isalpha()
            and word not in VAGUE
            and n > 0.25 * uses[word]
            and noun_like[word] > 0.3 * n
            and intense[word] < 0.02 * uses[word]
            and self.stories_with[word] < 0.2 * len(stories)
        )

    def ask(self, story: str, draw: random.Random, *, again: bool = False) -> str:
        """Return a request with `story` as the answer; `again` if a story came before."""
        subjects = self._subjects(story)[: draw.choice((1, 2, 2, 2, 3))]
        if not subjects:
            return "Tell me another story." if again else "Tell me a story."
        named = dict(re.findall(r"\b([a-z]+) named ([A-Z][a-z]+)\b", story))
        phrases = [self._phrase(word) for word in subjects]
        if draw.random() < 0.3 and subjects[0] in named:
            phrases[0] += f" named {named[subjects[0]]}"
        *most, last = phrases
        listed = f"{', '.join(most)} and {last}" if most else last
        return draw.choice(AGAIN if again else FIRST).format(listed)

    def _subjects(self, story: str) -> list[str]:
        counts = Counter(word for word in _words(story) if word in self.nouns)
        rarity = {w: math.log(self.num_stories / self.stories_with[w]) for w in counts}
        return sorted(counts, key=lambda word: -counts[word] * rarity[word])[:3]

    def _phrase(self, word: str) -> str:
        """Return a noun with the article used in the stories: a dog, an owl, apples, the rain."""
        counts = {article: self.counted[article, word] for article in ARTICLES}
        if counts["a"] + counts["an"] > 0.1 * counts["the"]:
            return f"{'a' if counts['a'] > counts['an'] else 'an'} {word}"
        return word if re.search("[^s]s$", word) else f"the {word}"


def _words(story: str) -> list[str]:
    return re.findall(r"[a-z']+|[.,!?\"]", story.lower())
