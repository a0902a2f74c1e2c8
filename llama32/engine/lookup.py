"""Drafts without a model: what followed the last time that the text was as it is now.

Answers repeat what they are about: the names and sentences of a text, the lines of code, and
themselves. Where the last few tokens have occurred before, what followed then is a guess that
costs nothing but the rows to verify it. (prompt lookup decoding, Saxena 2023)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama32.config import LlamaConfig
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Drafts from the request's own prompt and output: what followed the latest occurrence of its
    last tokens, of as many as can be found from `max_ngram` down to `min_ngram`."""

    max_ngram: int = 3
    min_ngram: int = 2
    num_tokens: int = 8  # drafts of a request in a step, at most

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
        """None of the KV cache's memory."""
        return 0

    def drafter(self, config: LlamaConfig, settings: EngineSettings) -> "LookupDrafter":
        """Any model will do."""
        return LookupDrafter(self)


class LookupDrafter:
    """Knows of every request that it was asked for where its n-grams are."""

    def __init__(self, lookup: PromptLookup) -> None:
        self._sizes = range(lookup.max_ngram, lookup.min_ngram - 1, -1)
        self._texts: dict[Request, Text] = {}

    def propose(self, asked: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """Of those whose last tokens have occurred before, what followed then."""
        return {request: self._text(request).continuation(n) for request, n in asked.items()}

    def release(self, request: Request) -> None:
        """Its text is no longer needed."""
        self._texts.pop(request, None)

    def _text(self, request: Request) -> "Text":
        text = self._texts.setdefault(request, Text(self._sizes))
        text.extend(request.ids(len(text.tokens), request.length))
        return text


class Text:
    """Tokens, and where each n-gram of them was followed by something the last time.

    That is kept up as the text grows, so that a step does not cost more in a long one.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._sizes = sizes  # of the n-grams, the best one first
        self._followed: dict[tuple[int, ...], int] = {}

    def extend(self, more: Sequence[int]) -> None:
        """The text goes on. Its last n-grams are not followed by anything yet."""
        for token in more:
            end = len(self.tokens)
            for size in self._sizes:
                if size <= end:
                    self._followed[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def continuation(self, count: int) -> Sequence[int]:
        """What may follow; nothing where the last tokens are new. Where it runs into the end it
        goes on with itself, since a text that has begun to repeat itself may do so again."""
        for size in self._sizes:
            start = self._followed.get(tuple(self.tokens[-size:]))
            if start is not None:
                period = self.tokens[start : start + count]
                return [period[i % len(period)] for i in range(count)]
        return []
