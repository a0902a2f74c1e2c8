"""The output of a request as text, up to a stop string."""

from dataclasses import dataclass
from typing import Any

from llama32.engine.request import Request
from llama32.generate import Token
from llama32.sampling import TokenLogprobs
from llama32.text.chat import Chat, Control
from llama32.text.stop_strings import StopStrings
from llama32.text.tokenizer import Tokenizer
from llama32.text.tool_calls import ToolCallBuffer


@dataclass(frozen=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens found in the prefix cache


@dataclass(frozen=True)
class Result:
    """The output of a prompt."""

    text: str  # without the stop string or control token at the end
    ids: list[int]  # all generated ids, the stop id included
    finish_reason: str  # "stop", "length", "abort" if the caller stopped reading, or "error"
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None  # one per id, if `Sampling.logprobs` is set
    message: dict[str, Any] | None = None  # for a chat: {"role", "content", "tool_calls"}
    messages: list[dict[str, Any]] | None = None  # for a chat: everything that continues the dialog
    call_problem: str | None = None  # why text that looks like a tool call is not one
    error: Exception | None = None  # in a batch only: a single prompt raises the exception


class ResultBuilder:
    """Follows a running request and builds text and result from new tokens.

    In a chat, tool calls are not part of the text: `result.message` holds them complete. At a stop
    string the builder finishes before the request, and the owner must abort the request.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, chat: Chat | None = None
    ) -> None:
        self.request = request
        self.tokens: list[Token] = []  # processed so far; the text of the last may be held back
        self.text = ""
        self.finish_reason: str | None = None
        self._chat = chat
        self._tool_calls = ToolCallBuffer() if chat else None
        self._stops = StopStrings(request.sampling.stop)
        self._decoder = tokenizer.stream() if tokenizer else None

    @property
    def is_finished(self) -> bool:
        """True if no more text follows."""
        return self.finish_reason is not None

    def update(self) -> str:
        """Process new tokens without waiting, and return the new text."""
        text = ""
        if len(self.tokens) == len(self.request.tokens) and not self.request.finish_reason:
            return text  # the common case among many requests
        for token in self.request.tokens[len(self.tokens) :]:
            text += self._push(token)
            if self.is_finished:
                break
        if not self.is_finished and len(self.tokens) == len(self.request.tokens):
            self.finish_reason = self.request.finish_reason  # "abort" and "error" have no token
        return text

    @property
    def result(self) -> Result:
        """The result, possibly partial."""
        ids = [token.id for token in self.tokens]
        logprobs = [token.logprobs for token in self.tokens if token.logprobs is not None]
        message, problem = self._chat.parse_with_problem(ids) if self._chat else (None, None)
        if message and self._stops.hit and not message["tool_calls"]:
            message["content"] = self.text
        return Result(
            text=self.text,
            ids=ids,
            finish_reason=self.finish_reason or "abort",
            usage=Usage(len(self.request.prompt), len(ids), self.request.num_cached),
            logprobs=logprobs or None,
            message=message,
            messages=[message] if message else None,
            call_problem=problem,
            error=self.request.error,
        )

    def _push(self, token: Token) -> str:
        """Process a token and return the text to show."""
        if self._chat and not self.tokens and token.id == self._chat.control.get(Control.PYTHON):
            self._tool_calls = ToolCallBuffer(is_call=True)
        self.tokens.append(token)
        reason, piece = token.finish_reason, ""
        is_text = reason != "stop" or token.id not in self.request.stop_ids
        if self._decoder and is_text:
            piece = self._stops.push(self._decoder.push(token.id))
        if self._decoder and reason:
            piece += self._stops.push(self._decoder.flush()) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.hit else reason
        self.text += piece
        if self._chat is None or self._tool_calls is None:
            return piece
        shown = self._tool_calls.push(piece)
        ids = (token.id for token in self.tokens)
        if self.is_finished and not self._chat.parse(ids)["tool_calls"]:
            shown += self._tool_calls.flush()
        return shown
