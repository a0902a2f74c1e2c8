"""A loaded checkpoint: text in, text out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, overload

from llama32.config import LlamaConfig
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.llm.candidates import candidate_settings, most_likely
from llama32.llm.progress import progress_bar
from llama32.llm.prompt import CompilerCache, PreparedPrompt, Prompt
from llama32.llm.result import Result
from llama32.llm.stream import Stream
from llama32.model import Llama
from llama32.sampling_params import Grammar, Sampling
from llama32.text.chat import Chat
from llama32.text.grammar import GrammarMatcher
from llama32.text.tokenizer import Tokenizer
from llama32.text.tools import Tools


@dataclass(frozen=True)
class LLM:
    """A model with the tokenizer, chat format and defaults of its checkpoint; see `load`.

    Methods that generate accept a `Sampling` in place of the checkpoint's `defaults`, and single
    settings by name: `generate(text, temperature=0)`.
    """

    model: Llama
    tokenizer: Tokenizer | None  # None: token ids in, token ids out
    chat_format: Chat | None  # None: a base model, not trained to chat
    defaults: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    engine_settings: EngineSettings = field(default_factory=EngineSettings)
    _engines: dict[Any, Engine] = field(default_factory=dict, init=False, repr=False, compare=False)
    _compilers: CompilerCache = field(
        default_factory=CompilerCache, init=False, repr=False, compare=False
    )
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @property
    def engine(self) -> Engine:
        """The engine that runs all requests, created at first use.

        A new engine replaces a closed one (`engine.close()` frees the cache), and is also created
        after the model has moved to another device or dtype.
        """
        weight = self.model.norm.weight
        key = weight.device, weight.dtype
        with self._lock:
            if key not in self._engines or self._engines[key].is_closed:
                for engine in self._engines.values():
                    engine.close()
                self._engines.clear()
                self._engines[key] = Engine.of(self.model, self.engine_settings)
            return self._engines[key]

    def warm_up(self, on_progress: Callable[[int, int], object] = lambda done, total: None) -> None:
        """Compile in advance, as `engine_settings` specify, not during the first request."""
        self.engine.warm_up(on_progress)

    @overload
    def generate(
        self, prompt: Prompt, sampling: Sampling | None = None, **changes: Any
    ) -> Result: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        progress: bool | None = None,
        **changes: Any,
    ) -> list[Result]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        progress: bool | None = None,
        **changes: Any,
    ) -> Result | list[Result]:
        """Continue a prompt, or a list of prompts as one batch.

        A prompt is text or token ids. A prefix shared by several prompts is computed once. With a
        list of prompts, `sampling` may be a list too. `progress` shows a bar; None means only on a
        terminal. Raises ValueError before any prompt runs if a prompt is invalid. A later failure
        affects a single prompt: the result has the finish reason "error" and holds the exception.
        """
        if isinstance(prompt, str) or all(isinstance(part, int) for part in prompt):
            return self.stream(prompt, sampling, **changes).run()  # pyright: ignore
        settings = [sampling] * len(prompt) if not isinstance(sampling, Sequence) else sampling
        if len(settings) != len(prompt):
            raise ValueError(
                f"sampling: {len(settings)} settings for {len(prompt)} prompts; give one for all, "
                "or a list with one for each"
            )
        pairs = zip(prompt, settings, strict=True)
        return self._run([(text, self._sampling(base, changes)) for text, base in pairs], progress)

    def sample(
        self,
        prompt: Prompt,
        n: int,
        sampling: Sampling | None = None,
        *,
        best_of: int | None = None,
        progress: bool | None = None,
        **changes: Any,
    ) -> list[Result]:
        """Return `n` continuations of a prompt; the prompt is computed only once.

        The first continuation uses a given seed; the rest use seeds derived from the seed.
        `best_of` is the number of continuations to generate; the `n` with the highest mean
        log-probability per token are returned, highest first.
        """
        num_candidates = n if best_of is None else best_of
        if not 1 <= n <= num_candidates:
            raise ValueError(f"sample: n is {n} and best_of {best_of}, allowed: 1 <= n <= best_of")
        settings = self._sampling(sampling, changes)
        candidates = candidate_settings(settings, num_candidates, ranked=best_of is not None)
        results = self._run([(prompt, candidate) for candidate in candidates], progress)
        if best_of is None:
            return results
        best = most_likely(results, n)
        if settings.logprobs is None:
            best = [dataclasses.replace(result, logprobs=None) for result in best]
        return best

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> Stream:
        """Stream the continuation of a prompt in pieces. A piece never ends inside a character.

        `on_prefill(done, total)` counts the prompt tokens computed.
        """
        ids = self.encode(prompt)
        return self._start(self.prepare(ids, self._sampling(sampling, changes)), on_prefill)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        run_tools: bool = False,
        max_rounds: int = 8,
        date: str | None = None,
        **changes: Any,
    ) -> Result:
        """Answer a dialog of {"role", "content"} messages; append `result.messages` to continue.

        `tools` are JSON descriptions of functions, as in OpenAI's API, or Python functions, whose
        signature and docstring become the description (`text/tools.py`). `run_tools` runs the
        functions that the model calls, and the model reads the results or errors. The rounds end
        with an answer without a call, or after `max_rounds` rounds; the last message may then still
        be a call. `date` is the date in the prompt, like "26 Jul 2024"; None means today.
        """
        toolbox = Tools(tools or ())
        added: list[dict[str, Any]] = []
        for rounds_left in reversed(range(max_rounds + 1)):
            dialog = [*messages, *added]
            stream = self.stream_chat(dialog, sampling, tools=toolbox.schemas, date=date, **changes)
            result = stream.run()
            message = result.message
            assert message is not None
            if not run_tools or not rounds_left or not toolbox.can_run(message):
                return dataclasses.replace(result, messages=[*added, message])
            added += toolbox.run_calls(message)
        raise ValueError(f"max_rounds is {max_rounds}, allowed: 0 or more")

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        date: str | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> Stream:
        """Stream the answer to a dialog in pieces. Tool calls are returned, never run."""
        chat = self.require_chat()
        ids = chat.encode(messages, tools=Tools(tools or ()).schemas, date=date)
        prepared = self.prepare(ids, self._sampling(sampling, changes), chat)
        return self._start(prepared, on_prefill)

    def require_chat(self) -> Chat:
        """Return the chat format. Raises ValueError for a checkpoint without a chat format."""
        if self.chat_format is None:
            raise ValueError(
                "this checkpoint has no chat format, because it has no Llama 3 chat template; "
                "use generate, an Instruct checkpoint, or chat_style 'hub' if that format fits"
            )
        return self.chat_format

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises ValueError for a checkpoint without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: give token ids, not text")
        return self.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt. Text gets the begin token; ids stay unchanged."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self.require_tokenizer()
        if not prompt:
            raise ValueError("prompt: it is empty; give at least one word")
        return tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)

    def _sampling(self, sampling: Sampling | None, changes: Mapping[str, Any]) -> Sampling:
        return dataclasses.replace(sampling or self.defaults, **changes)

    def prepare(
        self, ids: list[int], sampling: Sampling, chat: Chat | None = None
    ) -> PreparedPrompt:
        """Add stop ids and the grammar matcher to token ids and settings.

        Raises ValueError if the settings need a tokenizer and the checkpoint lacks a tokenizer.
        """
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: this checkpoint has no tokenizer; use stop_ids")
        eos_ids = frozenset({*self.eos_ids, *(chat.stop_ids if chat else ())})
        matcher = self._matcher(sampling.grammar, eos_ids.union(sampling.stop_ids))
        return PreparedPrompt(ids, sampling, eos_ids, matcher, chat)

    def _start(
        self, prepared: PreparedPrompt, on_prefill: Callable[[int, int], None] | None = None
    ) -> Stream:
        engine = self.engine
        request = prepared.add(engine, on_prefill)
        return Stream(engine, request, self.tokenizer, prepared.chat)

    def _matcher(self, grammar: Grammar | None, eos_ids: frozenset[int]) -> GrammarMatcher | None:
        if grammar is None:
            return None
        if self.tokenizer is None or not eos_ids:
            raise ValueError("grammar: needs a tokenizer, and an id that ends a text (`stop_ids`)")
        return self._compilers.get(self.tokenizer, eos_ids).matcher(grammar)

    def _run(self, prompts: Sequence[tuple[Any, Sampling]], progress: bool | None) -> list[Result]:
        """Run prompts as a batch until all have ended."""
        with ExitStack() as stack:
            streams: list[Stream] = []
            for prompt, sampling in prompts:
                try:
                    streams.append(self._start(self.prepare(self.encode(prompt), sampling)))
                except ValueError as error:
                    error.add_note(f"This is prompt {len(streams)} of the list, counted from 0.")
                    raise
                stack.callback(streams[-1].close)
            report = stack.enter_context(progress_bar(self.engine, len(streams), progress))
            running = streams
            while running:
                self.engine.step()
                for stream in running:
                    stream.update()
                running = [stream for stream in running if not stream.is_finished]
                report(len(streams) - len(running))
            return [stream.result for stream in streams]
