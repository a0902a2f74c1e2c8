"""What came of requests, in the shapes of OpenAI's API: whole, or as the chunks of a stream."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from secrets import token_hex
from typing import Any

from llama32.generate import Token
from llama32.serve.schemas import Asked, ChatBody, CompletionBody
from llama32.tokenizer import Tokenizer
from llama32.transcript import Transcript

Json = dict[str, Any]


class Reply:
    """To one client. What the choices of each kind of completion look like, the two below say."""

    kind: str  # as `object` has it
    chunk_kind: str
    prefix: str  # of the id

    def __init__(self, body: Asked, tokenizer: Tokenizer | None, fingerprint: str) -> None:
        self.body = body
        self.tokenizer = tokenizer
        self.frame = {
            "id": f"{self.prefix}-{token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
        }
        self._begun: set[int] = set()
        self._told: Counter[int] = Counter()  # tokens of each choice whose logprobs were told
        self._length: Counter[int] = Counter()  # of their texts, in characters

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        asked = self.body.stream_options
        return bool(asked and asked.include_usage)

    def chunks(self, i: int, transcript: Transcript, piece: str) -> Iterator[Json]:
        """What is new of a choice: of it came `piece`."""
        if i not in self._begun:
            self._begun.add(i)
            yield from self.opening(i, transcript)
        if piece:
            yield self.chunk(i, self.text(piece), self.untold(i, transcript))
        if transcript.has_ended:
            yield from self.closing(i, transcript)

    def chunk(
        self, i: int, said: Json, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        """A part of a choice."""
        choice = {"index": i, **said, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.wants_usage else {}
        return {**self.frame, "object": self.chunk_kind, "choices": [choice], **usage}

    def usage_chunk(self, transcripts: Sequence[Transcript]) -> Json:
        """The last of a stream, where it was asked for."""
        usage = self.usage(transcripts)
        return {**self.frame, "object": self.chunk_kind, "choices": [], "usage": usage}

    def whole(self, transcripts: Sequence[Transcript]) -> Json:
        """All at once."""
        choices = [
            {
                "index": i,
                **self.choice(transcript),
                "logprobs": self.untold(i, transcript),
            }
            for i, transcript in enumerate(transcripts)
        ]
        usage = self.usage(transcripts)
        return {**self.frame, "object": self.kind, "choices": choices, "usage": usage}

    def usage(self, transcripts: Sequence[Transcript]) -> Json:
        """Tokens. A prompt with several choices counts once, as it was read for the first."""
        first = [t.request for t in transcripts[:: self.body.n or 1]]
        prompt = sum(len(request.prompt) for request in first)
        completion = sum(len(transcript.tokens) for transcript in transcripts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(r.num_cached for r in first)},
        }

    def untold(self, i: int, transcript: Transcript) -> Json | None:
        """The logprobs that were not yet told, where they are wanted."""
        if transcript.request.sampling.logprobs is None:
            return None
        told = self._told[i]
        tokens = self.visible(transcript)[told:]
        self._told[i] += len(tokens)
        return self.logprobs(i, tokens)

    def visible(self, transcript: Transcript) -> list[Token]:
        """The tokens that are in the text, not those that ended it."""
        tokens, stop_ids = transcript.tokens, transcript.request.stop_ids
        if transcript.reason != "stop" or self.tokenizer is None:
            return tokens
        left, seen = len(transcript.text.encode()), []
        for token in tokens:
            if left <= 0 or token.id in stop_ids:
                break
            seen.append(token)
            left -= len(self.tokenizer.decode_bytes([token.id]))
        return seen

    def spelled(self, id: int) -> tuple[str, list[int]]:
        """A token as text and in bytes."""
        if self.tokenizer is None:
            return f"token_id:{id}", []
        spelling = self.tokenizer.decode_bytes([id])
        return spelling.decode(errors="replace"), [*spelling]

    def opening(self, i: int, transcript: Transcript) -> Iterator[Json]:
        """The chunks before the first text of a choice."""
        raise NotImplementedError

    def text(self, piece: str) -> Json:
        """How a piece of text stands in a chunk."""
        raise NotImplementedError

    def closing(self, i: int, transcript: Transcript) -> Iterator[Json]:
        """The chunks behind it."""
        raise NotImplementedError

    def choice(self, transcript: Transcript) -> Json:
        """The whole of one, and its finish reason."""
        raise NotImplementedError

    def logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        """Of some tokens of a choice, which come in their order."""
        raise NotImplementedError


class ChatReply(Reply):
    """To POST /v1/chat/completions"""

    body: ChatBody
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, i: int, transcript: Transcript) -> Iterator[Json]:
        yield self.chunk(i, {"delta": {"role": "assistant", "content": ""}})

    def text(self, piece: str) -> Json:
        return {"delta": {"content": piece}}

    def closing(self, i: int, transcript: Transcript) -> Iterator[Json]:
        if calls := self.calls(transcript):
            numbered = [{"index": at, **call} for at, call in enumerate(calls)]
            yield self.chunk(i, {"delta": {"tool_calls": numbered}})
        rest = self.untold(i, transcript)
        is_new = rest is not None and rest["content"]
        reason = "tool_calls" if calls else transcript.reason
        yield self.chunk(i, {"delta": {}}, rest if is_new else None, reason)

    def choice(self, transcript: Transcript) -> Json:
        calls = self.calls(transcript)
        content = None if calls else transcript.text
        message = {"role": "assistant", "content": content, "refusal": None}
        if not calls:
            return {"message": message, "finish_reason": transcript.reason}
        return {"message": {**message, "tool_calls": calls}, "finish_reason": "tool_calls"}

    def calls(self, transcript: Transcript) -> list[Json]:
        """The tool calls, under ids that no other call has."""
        message = transcript.result.message or {}
        found = [call["function"] for call in message.get("tool_calls", ())]
        return [
            {
                "id": f"call_{token_hex(12)}",
                "type": "function",
                "function": {
                    "name": unbroken(function["name"]),
                    "arguments": unbroken(json.dumps(function["arguments"], ensure_ascii=False)),
                },
            }
            for function in (found[:1] if self.body.parallel_tool_calls is False else found)
        ]

    def logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> Json:
        assert token.logprobs is not None
        top = [self._scored(id, value) for id, value in token.logprobs.top.items()]
        return {**self._scored(token.id, token.logprobs.chosen), "top_logprobs": top}

    def _scored(self, id: int, logprob: float) -> Json:
        text, spelling = self.spelled(id)
        return {"token": text, "logprob": finite(logprob), "bytes": spelling}


class CompletionReply(Reply):
    """To POST /v1/completions"""

    body: CompletionBody
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def opening(self, i: int, transcript: Transcript) -> Iterator[Json]:
        if echo := self.echo(transcript):
            yield self.chunk(i, self.text(echo))

    def text(self, piece: str) -> Json:
        return {"text": piece}

    def closing(self, i: int, transcript: Transcript) -> Iterator[Json]:
        yield self.chunk(i, self.text(""), self.untold(i, transcript), transcript.reason)

    def choice(self, transcript: Transcript) -> Json:
        text = self.echo(transcript) + transcript.text
        return {**self.text(text), "finish_reason": transcript.reason}

    def echo(self, transcript: Transcript) -> str:
        """The prompt, where it is to be told."""
        if not self.body.echo or self.tokenizer is None:
            return ""
        ids = list(transcript.request.prompt)
        is_text = isinstance(self.body.prompts[0], str)
        begins = is_text and ids[:1] == [self.tokenizer.bos_id]
        return self.tokenizer.decode(ids[begins:])

    def logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        told: Json = {name: [] for name in "tokens token_logprobs top_logprobs text_offset".split()}
        for token in tokens:
            assert token.logprobs is not None
            text = self.spelled(token.id)[0]
            top = {self.spelled(id)[0]: finite(p) for id, p in token.logprobs.top.items()}
            told["tokens"].append(text)
            told["text_offset"].append(self._length[i])
            self._length[i] += len(text)
            told["token_logprobs"].append(finite(token.logprobs.chosen))
            told["top_logprobs"].append(top)
        return told


def unbroken(text: str) -> str:
    """Half a character (JSON can write it, UTF-8 cannot) as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def finite(logprob: float) -> float:
    """As JSON can carry it. (OpenAI has the same number for the impossible)"""
    return max(logprob, -9999.0)
