"""One request: what it asks for, what it holds, how far it is. Plain data that others move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama32.engine.prefix import PageKey
from llama32.settings import Sampling


@dataclass(eq=False, kw_only=True)
class Request:
    """Its tokens are those of the prompt, then those of the output.

    Of these, `num_computed` have their keys and values in `pages`. The last prompt token is
    computed like a generated one, not with the rest of the prompt: logits are wanted of it.
    Behind them, for one step, there may be drafts: guesses at the next tokens.
    """

    prompt: Sequence[int]
    longest: int  # prompt and output together, at most
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    guide: Any = None  # of its grammar: a `guides.Guide` that goes along
    on_token: Callable[[Any], object] | None = None
    on_prefill: Callable[[int, int], object] | None = None

    keys: Sequence[PageKey] = ()  # of the pages that the prompt fills
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # of the prompt, found in the cache when the request first ran
    num_preemptions: int = 0

    output: list[int] = field(default_factory=list)
    drafts: Sequence[int] = ()
    tokens: list[Any] = field(default_factory=list)  # the same, each a `generate.Token`
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None: not ended
    error: Exception | None = None  # why, in the last case

    @property
    def num_prefill(self) -> int:
        """Prompt tokens whose logits nobody wants."""
        return len(self.prompt) - 1

    @property
    def length(self) -> int:
        """Tokens known so far; drafts are not."""
        return len(self.prompt) + len(self.output)

    def ids(self, start: int, stop: int) -> Sequence[int]:
        """The tokens from `start` on, up to `stop`; behind those known come the drafts."""
        border = len(self.prompt)
        if stop <= border:
            return self.prompt[start:stop]
        behind = self.output[max(start - border, 0) : stop - border]
        if stop > self.length:
            behind = [*behind, *self.drafts[max(start - self.length, 0) : stop - self.length]]
        return [*self.prompt[start:], *behind] if start < border else behind

    def output_with(self, num_drafts: int) -> Sequence[int]:
        """The output, if the first of its drafts are right."""
        return [*self.output, *self.drafts[:num_drafts]] if num_drafts else self.output

    def append(self, token: int) -> str | None:
        """The next token; returns the finish reason if it is the last. All before it are in the
        cache, or it could not have been drawn: also those of this step, which had been drafted."""
        self.num_computed = self.length
        self.output.append(token)
        if self.guide is not None:
            self.guide.push(token)
            if self.guide.is_finished:
                return "stop"
        if token in self.stop_ids:
            return "stop"
        return "length" if self.length >= self.longest else None
