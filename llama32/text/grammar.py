"""Grammars for outputs: a JSON schema, a regular expression, or a choice of texts.

At every step a matcher tells which tokens may follow, and the sampler draws among these tokens
alone, so a finished output has the given form at any temperature. llguidance computes the allowed
tokens from their bytes.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from llama32.sampling_params import Grammar
from llama32.text.tokenizer import Tokenizer

MAX_CACHED_GRAMMARS = 32
STEP_LIMIT = 400_000  # with llguidance's 1,000,000, one token could delay a batch for seconds


class GrammarMatcher:
    """The state of an output within a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """Return a bit for each token id, lowest bit first: 1 if the token may follow."""
        return self._matcher.compute_bitmask()

    def push(self, id: int) -> None:
        """Advance by a token. Raises ValueError if the grammar does not allow the token."""
        if not self._matcher.consume_token(id):
            raise ValueError(
                f"the grammar does not allow token {id}: {self._matcher.get_error():.300}"
            )

    @property
    def is_finished(self) -> bool:
        """True if no token may follow."""
        return self._matcher.is_stopped()


class Vocabulary:
    """A tokenizer in the interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [*tokenizer.special.values()]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, min(eos_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


class GrammarCompiler:
    """A compiler of grammars to matchers for one tokenizer; `eos_ids` end a text."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        # Imported on first use: most programs need no grammar.
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(Vocabulary(tokenizer, eos_ids))
        tokens = LLTokenizer(vocabulary, eos_token=sorted(eos_ids))
        limits = LLParserLimits(initial_lexer_fuel=STEP_LIMIT, verbose_errors=False)
        self._new_matcher = partial(LLMatcher, tokens, log_level=0, limits=limits)
        self._compiled: dict[Grammar, Any] = {}

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the start of a grammar.

        Raises ValueError if the grammar is invalid or too large.
        """
        if grammar not in self._compiled:
            matcher = self._new_matcher(to_llguidance(grammar))
            if matcher.is_error():
                raise ValueError(f"grammar: {' '.join(matcher.get_error().split()):.300}")
            if len(self._compiled) >= MAX_CACHED_GRAMMARS:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[grammar] = matcher
        return GrammarMatcher(self._compiled[grammar].deep_copy())


def to_llguidance(grammar: Grammar) -> str:
    """Return a grammar in llguidance's format.

    JSON gets the spaces of `json.dumps`, which models know. A grammar with free spaces would let a
    model without a likely next token write spaces for ever.
    """
    from llguidance import LLMatcher, grammar_from

    if grammar.kind != "json_schema":
        return grammar_from(grammar.kind, grammar.text)
    spaces: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return LLMatcher.grammar_from_json_schema(grammar.text, defaults=spaces)
