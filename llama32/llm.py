"""The friendly face: a checkpoint, loaded whole, that turns text into text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, overload

from llama32.chat import Chat
from llama32.config import LlamaConfig
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings
from llama32.guides import Guide, Guides
from llama32.model import Llama
from llama32.progress import watch
from llama32.sampling import derive_seed
from llama32.settings import Grammar, Sampling
from llama32.stream import Stream
from llama32.tokenizer import Tokenizer
from llama32.tools import Tools
from llama32.transcript import Result

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Prepared:
    """A prompt that can be added to an engine, and what is to be made of it."""

    ids: list[int]
    sampling: Sampling
    eos_ids: frozenset[int]
    guide: Guide | None
    chat: Chat | None  # whose message the output is, if it is one

    def add(
        self, engine: Engine, on_prefill: Callable[[int, int], object] | None = None
    ) -> Request:
        """Queue it. ValueError where it could never run."""
        return engine.add(
            self.ids,
            self.sampling,
            eos_ids=self.eos_ids,
            guide=self.guide,
            on_prefill=on_prefill,
        )


@dataclass(frozen=True)
class LLM:
    """A model with all that its checkpoint says of how to use it. `load` makes one.

    `defaults` are the checkpoint's sampling settings. Every method takes a `Sampling` of your own
    in their place, and single settings by name that change it: `generate(text, temperature=0)`.
    """

    model: Llama
    tokenizer: Tokenizer | None  # None: ids in, ids out
    chat_format: Chat | None  # None: the checkpoint was not taught to chat
    defaults: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    engine_settings: EngineSettings = field(default_factory=EngineSettings)
    _engines: dict[Any, Engine] = field(default_factory=dict, init=False, repr=False, compare=False)
    _guides: dict[Any, Guides] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @property
    def engine(self) -> Engine:
        """What all requests run through: made when it is first needed, and anew where it was closed
        (which frees the cache) or the model has moved to another device or dtype."""
        weight = self.model.norm.weight
        place = weight.device, weight.dtype
        with self._lock:
            if place not in self._engines or self._engines[place].is_closed:
                for engine in self._engines.values():
                    engine.close()
                self._engines.clear()
                self._engines[place] = Engine.of(self.model, self.engine_settings)
            return self._engines[place]

    def warm_up(self, on_progress: Callable[[int, int], object] = lambda done, of: None) -> None:
        """Compile now what `engine_settings` want compiled, and not with the first requests."""
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
        """Continue a text, or the token ids of one; for a list of prompts, a list of results.

        A list runs as one batch, and what its prompts share at their beginning is computed once.
        `sampling` may be a list then, too. `progress` shows a bar; None does so on a terminal.
        A prompt that cannot run raises ValueError before any does. What fails later fails alone:
        its result has the finish reason "error", and says which.
        """
        if isinstance(prompt, str) or all(isinstance(part, int) for part in prompt):
            return self.stream(prompt, sampling, **changes).run()  # pyright: ignore
        given = [sampling] * len(prompt) if not isinstance(sampling, Sequence) else sampling
        if len(given) != len(prompt):
            raise ValueError(f"sampling: {len(given)} are given for {len(prompt)} prompts")
        pairs = zip(prompt, given, strict=True)
        asked = [(one, self._sampling(its, changes)) for one, its in pairs]
        return self._run(asked, progress)

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
        """`n` continuations of one prompt, which is computed once.

        With a seed, each gets one derived from it, the first the seed itself. `best_of` makes that
        many and keeps the `n` whose tokens the model finds likeliest on average, likeliest first.
        """
        made = n if best_of is None else best_of
        if not 1 <= n <= made:
            raise ValueError(f"sample: n is {n} and best_of {best_of}, allowed: 1 <= n <= best_of")
        settings = self._sampling(sampling, changes)
        scored = dataclasses.replace(settings, logprobs=settings.logprobs or 0)
        each = [settings if best_of is None else scored] * made
        if settings.seed is not None:
            seeds = [derive_seed(settings.seed, i) for i in range(made)]
            each = [dataclasses.replace(one, seed=s) for one, s in zip(each, seeds, strict=True)]
        results = self._run([(prompt, one) for one in each], progress)
        if best_of is None:
            return results
        best = sorted(results, key=mean_logprob, reverse=True)[:n]
        hides = settings.logprobs is None
        return [dataclasses.replace(one, logprobs=None) if hides else one for one in best]

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> Stream:
        """The same, piece by piece. A piece never ends inside a character."""
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
        """Answer a dialog of {"role", "content"} messages; `result.messages` continue it.

        `tools` are JSON descriptions of functions, as in OpenAI's API, or Python functions: then
        signature and docstring are the description (`tools.py`). With `run_tools` those that the
        model calls are run, and it is told what they gave or raised, until it answers without a
        call, or has had `max_rounds` of them: its last message may then be one more call. `date` is
        what the model is told of today, "26 Jul 2024"; None is today.
        """
        given = Tools(tools or ())
        added: list[dict[str, Any]] = []
        for rounds_left in reversed(range(max_rounds + 1)):
            dialog = [*messages, *added]
            stream = self.stream_chat(dialog, sampling, tools=given.schemas, date=date, **changes)
            result = stream.run()
            message = result.message
            assert message is not None
            if not run_tools or not rounds_left or not given.can_run(message):
                return dataclasses.replace(result, messages=[*added, message])
            added += given.answers(message)
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
        """The answer, piece by piece."""
        chat = self.require_chat()
        ids = chat.encode(messages, tools=Tools(tools or ()).schemas, date=date)
        prepared = self.prepare(ids, self._sampling(sampling, changes), chat)
        return self._start(prepared, on_prefill)

    def require_chat(self) -> Chat:
        """The chat format; ValueError where there is none."""
        if self.chat_format is None:
            raise ValueError(
                "this checkpoint has no chat format: it comes without a template of Llama 3's; "
                "use generate, an Instruct checkpoint, or the chat_style 'hub' if it fits"
            )
        return self.chat_format

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: give token ids, not text")
        return self.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a text that is to be continued; ids stay as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self.require_tokenizer()
        if not prompt:
            raise ValueError("prompt: it is empty; give at least one word")
        return tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)

    def _sampling(self, sampling: Sampling | None, changes: Mapping[str, Any]) -> Sampling:
        return dataclasses.replace(sampling or self.defaults, **changes)

    def prepare(self, ids: list[int], sampling: Sampling, chat: Chat | None = None) -> Prepared:
        """All that an engine has to know of a prompt. ValueError where it asks for what cannot
        be."""
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: this checkpoint has no tokenizer; use stop_ids")
        eos_ids = frozenset({*self.eos_ids, *(chat.stop_ids if chat else ())})
        guide = self._guide(sampling.grammar, eos_ids.union(sampling.stop_ids))
        return Prepared(ids, sampling, eos_ids, guide, chat)

    def _start(
        self, prepared: Prepared, on_prefill: Callable[[int, int], None] | None = None
    ) -> Stream:
        engine = self.engine
        request = prepared.add(engine, on_prefill)
        return Stream(engine, request, self.tokenizer, prepared.chat)

    def _guide(self, grammar: Grammar | None, eos_ids: frozenset[int]) -> Guide | None:
        """Through the grammar of one request."""
        if grammar is None:
            return None
        if self.tokenizer is None or not eos_ids:
            raise ValueError("grammar: needs a tokenizer, and an id that ends a text (`stop_ids`)")
        with self._lock:
            if eos_ids not in self._guides:  # of 128,256 tokens it takes a second, and 50 MB
                while len(self._guides) >= 4:
                    del self._guides[next(iter(self._guides))]
                self._guides[eos_ids] = Guides(self.tokenizer, eos_ids)
            return self._guides[eos_ids].guide(grammar)

    def _run(self, asked: Sequence[tuple[Any, Sampling]], progress: bool | None) -> list[Result]:
        """All to their ends, together."""
        with ExitStack() as stack:
            streams: list[Stream] = []
            for prompt, sampling in asked:
                try:
                    streams.append(self._start(self.prepare(self.encode(prompt), sampling)))
                except ValueError as error:
                    error.add_note(f"This is prompt {len(streams)} of the list, counted from 0.")
                    raise
                stack.callback(streams[-1].close)
            report = stack.enter_context(watch(self.engine, len(streams), progress))
            running = streams
            while running:
                self.engine.step()
                for stream in running:
                    stream.catch_up()
                running = [stream for stream in running if not stream.has_ended]
                report(len(streams) - len(running))
            return [stream.result for stream in streams]


def mean_logprob(result: Result) -> float:
    """How likely the model finds a text, for each of its tokens."""
    logprobs = result.logprobs or []
    return sum(one.chosen for one in logprobs) / max(len(logprobs), 1)
