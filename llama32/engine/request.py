"""One request as plain data: input, pages, progress and output.

The scheduler and the engine update the fields.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama32.engine.prefix_cache import PageKey
from llama32.sampling_params import Sampling


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt with its settings, and the tokens generated so far.

    The keys and values of the first `num_computed` tokens of prompt and output are in `pages`. The
    last prompt token is computed as a decode row, like a generated token, because sampling needs
    its logits. During a step, `drafts` are guesses at the tokens after the known tokens.
    """

    prompt: Sequence[int]
    max_length: int  # of prompt and output together
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    matcher: Any = None  # a `text.grammar.GrammarMatcher`; every output token advances the matcher
    on_token: Callable[[Any], object] | None = None
    on_prefill: Callable[[int, int], object] | None = None

    keys: Sequence[PageKey] = ()  # of the pages that the prompt fills
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when the request first started
    num_preemptions: int = 0

    output: list[int] = field(default_factory=list)
    drafts: Sequence[int] = ()
    tokens: list[Any] = field(default_factory=list)  # the output as `generate.Token`s
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None: not finished
    error: Exception | None = None  # set if the finish reason is "error"

    @property
    def num_prefill_tokens(self) -> int:
        """Number of prompt tokens computed without logits: all but the last."""
        return len(self.prompt) - 1

    @property
    def length(self) -> int:
        """Number of known tokens: prompt and output, without drafts."""
        return len(self.prompt) + len(self.output)

    def ids(self, start: int, stop: int) -> Sequence[int]:
        """Return the tokens from `start` up to `stop`; drafts follow the known tokens."""
        prompt_length = len(self.prompt)
        if stop <= prompt_length:
            return self.prompt[start:stop]
        tail = self.output[max(start - prompt_length, 0) : stop - prompt_length]
        if stop > self.length:
            tail = [*tail, *self.drafts[max(start - self.length, 0) : stop - self.length]]
        return [*self.prompt[start:], *tail] if start < prompt_length else tail

    def output_with(self, num_drafts: int) -> Sequence[int]:
        """Return the output followed by the first `num_drafts` drafts."""
        return [*self.output, *self.drafts[:num_drafts]] if num_drafts else self.output

    def append(self, token: int) -> str | None:
        """Append the next token; return the finish reason if the token is the last.

        All tokens before are in the cache by now, accepted drafts of the same step included.
        Raises ValueError if the matcher fails.
        """
        self.num_computed = self.length
        self.output.append(token)
        if self.matcher is not None:
            self.matcher.push(token)
            if self.matcher.is_finished:
                return "stop"
        if token in self.stop_ids:
            return "stop"
        return "length" if self.length >= self.max_length else None
