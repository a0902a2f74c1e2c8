"""Draft tokens without a model: repeat what followed the last tokens when they occurred before.

Answers repeat parts of the prompt and of themselves: names, sentences, lines of code. If the last
few tokens have occurred before, the tokens that followed are a guess at no cost but the decode rows
that verify the guess. (prompt lookup decoding, Saxena 2023)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama32.config import LlamaConfig
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Drafts from the request's own prompt and output.

    The drafts are the tokens after the latest earlier occurrence of the last n tokens, for the
    largest n from `max_ngram` down to `min_ngram` with an occurrence.
    """

    max_ngram: int = 3
    min_ngram: int = 2
    num_tokens: int = 8  # drafts per request and step, at most

    def __post_init__(self) -> None:
        for name in ("max_ngram", "min_ngram", "num_tokens"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"PromptLookup: {name} is {value!r}, allowed: 1 or more")
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"PromptLookup: min_ngram is {self.min_ngram}, above max_ngram, {self.max_ngram}"
            )

    @property
    def bytes_per_token(self) -> int:
        """KV cache memory of the drafter: 0."""
        return 0

    def drafter(self, config: LlamaConfig, settings: EngineSettings) -> "LookupDrafter":
        """Return a drafter; any model will do."""
        return LookupDrafter(self)


class LookupDrafter:
    """Keeps an n-gram index of every request that gets drafts."""

    def __init__(self, lookup: PromptLookup) -> None:
        self._sizes = range(lookup.max_ngram, lookup.min_ngram - 1, -1)
        self._indexes: dict[Request, NgramIndex] = {}

    def propose(self, limits: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """Return the tokens after earlier occurrences of each request's last tokens."""
        return {request: self._index(request).continuation(n) for request, n in limits.items()}

    def release(self, request: Request) -> None:
        """Delete the index of a request."""
        self._indexes.pop(request, None)

    def _index(self, request: Request) -> "NgramIndex":
        index = self._indexes.setdefault(request, NgramIndex(self._sizes))
        index.extend(request.ids(len(index.tokens), request.length))
        return index


class NgramIndex:
    """Tokens, with the position after the latest occurrence of each n-gram.

    Every token updates the index, so a step costs no more in a long text.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._sizes = sizes  # of the n-grams, in order of preference
        self._next_position: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. N-grams at the very end get no entry until a token follows."""
        for token in tokens:
            end = len(self.tokens)
            for size in self._sizes:
                if size <= end:
                    self._next_position[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def continuation(self, count: int) -> Sequence[int]:
        """Return `count` likely next tokens, or an empty list if the last tokens are new.

        A match close to the end gives fewer tokens, which are then repeated: a text that has begun
        to repeat itself may continue to do so.
        """
        for size in self._sizes:
            start = self._next_position.get(tuple(self.tokens[-size:]))
            if start is not None:
                period = self.tokens[start : start + count]
                return [period[i % len(period)] for i in range(count)]
        return []
