"""Output of a form that is given: JSON by its schema, a regular expression, or one of some texts.

At every step a guide tells which tokens may follow, and the sampler draws among those alone, so
what is finished is of that form at any temperature. Which tokens may follow a text so far is worked
out by llguidance, from the bytes of each.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from llama32.settings import Grammar
from llama32.tokenizer import Tokenizer

MOST_KEPT = 32  # grammars that stay compiled
FUEL = 400_000  # of llguidance's 1,000,000, with which one token could hold up all for seconds


class Guide:
    """Where one text is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """A bit for each token, the lowest first: whether it may be next."""
        return self._matcher.compute_bitmask()

    def push(self, id: int) -> None:
        """This one is."""
        if not self._matcher.consume_token(id):
            raise ValueError(f"the grammar does not go on: {self._matcher.get_error():.300}")

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()


class Vocabulary:
    """The tokens of a tokenizer, as llguidance asks for them."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [*tokenizer.special.values()]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, min(eos_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


class Guides:
    """Makes guides for the tokens of one tokenizer, of which `eos_ids` end a text."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        # Here, since most who load a model never need it.
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(Vocabulary(tokenizer, eos_ids))
        tokens = LLTokenizer(vocabulary, eos_token=sorted(eos_ids))
        limits = LLParserLimits(initial_lexer_fuel=FUEL, verbose_errors=False)
        self._make = partial(LLMatcher, tokens, log_level=0, limits=limits)
        self._compiled: dict[Grammar, Any] = {}

    def guide(self, grammar: Grammar) -> Guide:
        """One at its beginning. ValueError for a grammar that is none, or too large."""
        if grammar not in self._compiled:
            matcher = self._make(compiled(grammar))
            if matcher.is_error():
                raise ValueError(f"grammar: {' '.join(matcher.get_error().split()):.300}")
            if len(self._compiled) >= MOST_KEPT:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[grammar] = matcher
        return Guide(self._compiled[grammar].deep_copy())


def compiled(grammar: Grammar) -> str:
    """As llguidance writes grammars. JSON has the spaces that `json.dumps` gives it, and models are
    used to; with any spaces allowed, a model at a loss writes nothing else."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind != "json_schema":
        return grammar_from(grammar.kind, grammar.text)
    spaces: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return LLMatcher.grammar_from_json_schema(grammar.text, defaults=spaces)
