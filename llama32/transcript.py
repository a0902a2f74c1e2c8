"""What one request says, as text: its tokens, decoded, up to a stop string."""

from dataclasses import dataclass
from typing import Any

from llama32.calls import HeldCalls
from llama32.chat import Chat, Control
from llama32.engine.request import Request
from llama32.generate import Token
from llama32.sampling import TokenLogprobs
from llama32.stopping import StopStrings
from llama32.tokenizer import Tokenizer


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: they were in the cache already


@dataclass(frozen=True)
class Result:
    """What came of one prompt."""

    text: str  # without the stop string or control token that ended it
    ids: list[int]  # all that was generated, the stop id included
    finish_reason: str  # "stop", "length", "abort" where the listener left, or "error"
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None  # one per id, where `Sampling.logprobs` asked
    message: dict[str, Any] | None = None  # of a chat: {"role", "content", "tool_calls"}
    messages: list[dict[str, Any]] | None = None  # of a chat: all that continues its dialog
    call_problem: str | None = None  # why what looks like a tool call is none
    error: Exception | None = None  # what ended it; never seen of a single prompt, which raises it


class Transcript:
    """Follows a request that others move on. Of a chat, tool calls are no text: they come as a
    whole, in `result.message`.

    Whoever follows it aborts the request where the transcript has ended before it: at a stop
    string.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, chat: Chat | None = None
    ) -> None:
        self.request = request
        self.tokens: list[Token] = []  # those in the text so far, and those that are held back
        self.text = ""
        self.reason: str | None = None
        self._chat = chat
        self._held = HeldCalls() if chat else None
        self._stops = StopStrings(request.sampling.stop)
        self._decoder = tokenizer.stream() if tokenizer else None

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.reason is not None

    def catch_up(self) -> str:
        """The text of what was generated since the last time; nothing is waited for."""
        text = ""
        if len(self.tokens) == len(self.request.tokens) and not self.request.finish_reason:
            return text  # at once: of many transcripts most are waiting
        for token in self.request.tokens[len(self.tokens) :]:
            text += self._push(token)
            if self.has_ended:
                break
        if not self.has_ended and len(self.tokens) == len(self.request.tokens):
            self.reason = self.request.finish_reason  # "abort" or "error": no token says so
        return text

    @property
    def result(self) -> Result:
        """The whole, or what there is of it."""
        ids = [token.id for token in self.tokens]
        logprobs = [token.logprobs for token in self.tokens if token.logprobs is not None]
        message, problem = self._chat.read(ids) if self._chat else (None, None)
        if message and self._stops.hit and not message["tool_calls"]:
            message["content"] = self.text
        return Result(
            text=self.text,
            ids=ids,
            finish_reason=self.reason or "abort",
            usage=Usage(len(self.request.prompt), len(ids), self.request.num_cached),
            logprobs=logprobs or None,
            message=message,
            messages=[message] if message else None,
            call_problem=problem,
            error=self.request.error,
        )

    def _push(self, token: Token) -> str:
        """One token more."""
        if self._chat and not self.tokens and token.id == self._chat.control.get(Control.PYTHON):
            self._held = HeldCalls(is_call=True)
        self.tokens.append(token)
        reason, piece = token.finish_reason, ""
        is_text = reason != "stop" or token.id not in self.request.stop_ids
        if self._decoder and is_text:
            piece = self._stops.push(self._decoder.push(token.id))
        if self._decoder and reason:
            piece += self._stops.push(self._decoder.flush()) + self._stops.flush()
        self.reason = "stop" if self._stops.hit else reason
        self.text += piece
        if self._chat is None or self._held is None:
            return piece
        shown = self._held.push(piece)
        if self.has_ended and not self._chat.parse(one.id for one in self.tokens)["tool_calls"]:
            shown += self._held.flush()
        return shown
