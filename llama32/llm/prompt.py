"""Prompts, prepared for an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.sampling_params import Sampling
from llama32.text.chat import Chat
from llama32.text.grammar import GrammarCompiler, GrammarMatcher
from llama32.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
MAX_COMPILERS = 4


@dataclass(frozen=True)
class PreparedPrompt:
    """Token ids with settings, stop ids and grammar matcher, ready for an engine."""

    ids: list[int]
    sampling: Sampling
    eos_ids: frozenset[int]
    matcher: GrammarMatcher | None
    chat: Chat | None  # parses the output as a message; None: the output is plain text

    def add(
        self, engine: Engine, on_prefill: Callable[[int, int], object] | None = None
    ) -> Request:
        """Queue the prompt. Raises ValueError if the request can never run."""
        return engine.add(
            self.ids,
            self.sampling,
            eos_ids=self.eos_ids,
            matcher=self.matcher,
            on_prefill=on_prefill,
        )


class CompilerCache:
    """Grammar compilers by set of end ids.

    A compiler takes a second to create and 50 MB for 128,256 tokens, so the newest
    `MAX_COMPILERS` are kept.
    """

    def __init__(self) -> None:
        self._compilers: dict[frozenset[int], GrammarCompiler] = {}
        self._lock = Lock()

    def get(self, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> GrammarCompiler:
        """Return the compiler for `eos_ids`, created if necessary."""
        with self._lock:
            if eos_ids not in self._compilers:
                while len(self._compilers) >= MAX_COMPILERS:
                    del self._compilers[next(iter(self._compilers))]
                self._compilers[eos_ids] = GrammarCompiler(tokenizer, eos_ids)
            return self._compilers[eos_ids]
