"""Text while it is made: the tokens of a request, decoded, up to a stop string."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama32.calls import HeldCalls
from llama32.chat import Chat, Control
from llama32.engine.engine import Engine
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


class Stream(Iterator[str]):
    """Iterate for the pieces; afterwards `result` holds the whole. Of a chat, tool calls are no
    pieces: they come as a whole, in `result.message`.

    It begins to move when someone asks for a piece, of this stream or of another of its engine.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        tokenizer: Tokenizer | None,
        chat: Chat | None = None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._chat = chat
        self._held = HeldCalls() if chat else None
        self._stops = StopStrings(request.sampling.stop)
        self._decoder = tokenizer.stream() if tokenizer else None
        self._seen: list[Token] = []
        self._text = ""
        self._reason: str | None = None

    def __next__(self) -> str:
        while not self.has_ended:
            self._engine.wait(self._request, len(self._seen))
            if piece := self.catch_up():
                return piece
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

    def __del__(self) -> None:
        """Nobody is going to listen any more."""
        self._engine.abort(self._request)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self._reason is not None

    def catch_up(self) -> str:
        """The text of what was generated since the last time; nothing is waited for."""
        text = ""
        if len(self._seen) == len(self._request.tokens) and not self._request.finish_reason:
            return text  # at once: of many streams most are waiting
        for token in self._request.tokens[len(self._seen) :]:
            text += self._push(token)
            if self.has_ended:
                break
        if not self.has_ended and len(self._seen) == len(self._request.tokens):
            self._reason = self._request.finish_reason  # "abort" or "error": no token says so
        return text

    def run(self) -> Result:
        """Wait for the whole."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Abort it, if it has not ended."""
        self._engine.abort(self._request)
        self._reason = self._reason or "abort"

    @property
    def result(self) -> Result:
        """The whole, or after a Ctrl-C what there is of it. Asking ends one that still runs."""
        self.close()
        ids = [token.id for token in self._seen]
        logprobs = [token.logprobs for token in self._seen if token.logprobs is not None]
        message, problem = self._chat.read(ids) if self._chat else (None, None)
        if message and self._stops.hit and not message["tool_calls"]:
            message["content"] = self._text
        return Result(
            text=self._text,
            ids=ids,
            finish_reason=self._reason or "abort",
            usage=Usage(len(self._request.prompt), len(ids), self._request.num_cached),
            logprobs=logprobs or None,
            message=message,
            messages=[message] if message else None,
            call_problem=problem,
            error=self._request.error,
        )

    def _push(self, token: Token) -> str:
        """One token more; a stop string ends the request."""
        if self._chat and not self._seen and token.id == self._chat.control.get(Control.PYTHON):
            self._held = HeldCalls(is_call=True)
        self._seen.append(token)
        reason, piece = token.finish_reason, ""
        is_text = reason != "stop" or token.id not in self._request.stop_ids
        if self._decoder and is_text:
            piece = self._stops.push(self._decoder.push(token.id))
        if self._decoder and reason:
            piece += self._stops.push(self._decoder.flush()) + self._stops.flush()
        if self._stops.hit:
            reason = "stop"
            self._engine.abort(self._request)
        self._reason = reason
        self._text += piece
        if self._chat is None or self._held is None:
            return piece
        shown = self._held.push(piece)
        if reason and not self._chat.parse(one.id for one in self._seen)["tool_calls"]:
            shown += self._held.flush()
        return shown
