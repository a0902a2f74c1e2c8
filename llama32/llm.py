"""The friendly face: a checkpoint, loaded whole, that turns text into text."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from llama32.chat import Chat
from llama32.config import LlamaConfig
from llama32.generate import Token, generate
from llama32.model import Llama
from llama32.sampling import TokenLogprobs
from llama32.settings import Sampling
from llama32.stopping import StopStrings
from llama32.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Result:
    """What came of one prompt."""

    text: str  # without the stop string or control token that ended it
    ids: list[int]  # all that was generated, the stop id included
    finish_reason: str  # "stop", "length", or "abort" where the listener left
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None  # one per id, where `Sampling.logprobs` asked
    message: dict[str, Any] | None = None  # of a chat: {"role", "content", "tool_calls"}


class Stream:
    """Text while it is made: iterate for the pieces; afterwards `result` holds the whole."""

    def __init__(
        self,
        tokens: Iterator[Token],
        num_prompt_tokens: int,
        stop: Sequence[str],
        tokenizer: Tokenizer | None,
        read_message: Callable[[list[int]], dict[str, Any]] | None = None,
    ) -> None:
        self._tokens = tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._stops = StopStrings(stop)
        self._tokenizer = tokenizer
        self._read_message = read_message
        self._seen: list[Token] = []
        self._text = ""
        self._reason = "abort"  # until the text ends by itself
        self._pieces = self._listen()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def run(self) -> Result:
        """Wait for the whole."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> Result:
        """The whole, or after a Ctrl-C what there is of it. Asking ends one that still runs."""
        self._pieces.close()
        ids = [token.id for token in self._seen]
        logprobs = [token.logprobs for token in self._seen if token.logprobs is not None]
        message = self._read_message(ids) if self._read_message else None
        if message and self._stops.hit and not message["tool_calls"]:
            message["content"] = self._text
        return Result(
            text=self._text,
            ids=ids,
            finish_reason=self._reason,
            usage=Usage(self._num_prompt_tokens, len(ids)),
            logprobs=logprobs or None,
            message=message,
        )

    def _listen(self) -> Generator[str, None, None]:
        decoder = self._tokenizer.stream() if self._tokenizer else None
        for token in self._tokens:
            self._seen.append(token)
            reason, piece = token.finish_reason, ""
            if decoder and reason != "stop":
                piece = self._stops.push(decoder.push(token.id))
            if decoder and reason:
                piece += self._stops.push(decoder.flush()) + self._stops.flush()
            if self._stops.hit:
                reason = "stop"
            self._text += piece
            self._reason = reason or self._reason
            if piece:
                yield piece
            if reason:
                return


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

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @overload
    def generate(
        self, prompt: Prompt, sampling: Sampling | None = None, **changes: Any
    ) -> Result: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], sampling: Sampling | None = None, **changes: Any
    ) -> list[Result]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], sampling: Sampling | None = None, **changes: Any
    ) -> Result | list[Result]:
        """Continue a text, or the token ids of one; for a list of prompts, a list of results."""
        if not isinstance(prompt, str) and any(not isinstance(part, int) for part in prompt):
            return [self.stream(one, sampling, **changes).run() for one in prompt]  # pyright: ignore
        return self.stream(prompt, sampling, **changes).run()  # pyright: ignore

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> Stream:
        """The same, piece by piece. A piece never ends inside a character."""
        return self._start(self._ids(prompt), sampling, changes, on_prefill)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: str | None = None,
        **changes: Any,
    ) -> Result:
        """Answer a dialog of {"role", "content"} messages; `result.message` continues it.

        `tools` are JSON descriptions of functions, as in OpenAI's API. `date` is what the model
        is told of today, "26 Jul 2024"; None is today.
        """
        return self.stream_chat(messages, sampling, tools=tools, date=date, **changes).run()

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: str | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> Stream:
        """The answer, piece by piece."""
        chat = self.require_chat()
        ids = chat.encode(messages, tools=tools, date=date)
        return self._start(ids, sampling, changes, on_prefill, chat)

    def require_chat(self) -> Chat:
        """The chat format; ValueError where there is none."""
        if self.chat_format is None:
            raise ValueError(
                "this checkpoint has no chat format: it comes without a template of Llama 3's; "
                "use generate, an Instruct checkpoint, or the chat_style 'hub' if it fits"
            )
        return self.chat_format

    def _ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: give token ids, not text")
        if not prompt:
            raise ValueError("prompt: it is empty; give at least one word")
        return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)

    def _start(
        self,
        ids: list[int],
        sampling: Sampling | None,
        changes: dict[str, Any],
        on_prefill: Callable[[int, int], None] | None,
        chat: Chat | None = None,
    ) -> Stream:
        sampling = dataclasses.replace(sampling or self.defaults, **changes)
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: this checkpoint has no tokenizer; use stop_ids")
        eos_ids = {*self.eos_ids, *(chat.stop_ids if chat else ())}
        tokens = generate(self.model, ids, sampling, eos_ids=eos_ids, on_prefill=on_prefill)
        read_message = chat.parse if chat else None
        return Stream(tokens, len(ids), sampling.stop, self.tokenizer, read_message)
