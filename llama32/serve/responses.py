"""Results in the JSON of OpenAI's API: a whole response, or the chunks of a stream."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from secrets import token_hex
from typing import Any

from llama32.generate import Token
from llama32.llm.result import ResultBuilder
from llama32.serve.schemas import ChatBody, CompletionBody, SamplingBody
from llama32.text.tokenizer import Tokenizer

Json = dict[str, Any]


class ResponseFormatter:
    """Formats the results of one request. Subclasses define the fields of a choice."""

    kind: str  # `object` of a whole response
    chunk_kind: str  # `object` of a chunk
    prefix: str  # of the id

    def __init__(self, body: SamplingBody, tokenizer: Tokenizer | None, fingerprint: str) -> None:
        self.body = body
        self.tokenizer = tokenizer
        self.id = f"{self.prefix}-{token_hex(12)}"
        self.common_fields = {
            "id": self.id,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
        }
        self._started: set[int] = set()  # choices that have sent a chunk
        self._num_logprobs_sent: Counter[int] = Counter()  # tokens, by choice
        self._text_offsets: Counter[int] = Counter()  # characters in the logprobs, by choice

    @property
    def wants_usage(self) -> bool:
        """True if the stream should end with the usage."""
        options = self.body.stream_options
        return bool(options and options.include_usage)

    def chunks(self, i: int, builder: ResultBuilder, new_text: str) -> Iterator[Json]:
        """Yield the chunks for the progress of choice `i`."""
        if i not in self._started:
            self._started.add(i)
            yield from self.opening(i, builder)
        if new_text:
            yield self.chunk(i, self.text_fields(new_text), self.new_logprobs(i, builder))
        if builder.is_finished:
            yield from self.closing(i, builder)

    def chunk(
        self, i: int, fields: Json, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        """Return a chunk with a part of choice `i`."""
        choice = {"index": i, **fields, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.wants_usage else {}
        return {**self.common_fields, "object": self.chunk_kind, "choices": [choice], **usage}

    def usage_chunk(self, builders: Sequence[ResultBuilder]) -> Json:
        """Return the last chunk of a stream with `include_usage`."""
        usage = self.usage(builders)
        return {**self.common_fields, "object": self.chunk_kind, "choices": [], "usage": usage}

    def response(self, builders: Sequence[ResultBuilder]) -> Json:
        """Return the whole response."""
        choices = [
            {
                "index": i,
                **self.choice_fields(builder),
                "logprobs": self.new_logprobs(i, builder),
            }
            for i, builder in enumerate(builders)
        ]
        usage = self.usage(builders)
        return {**self.common_fields, "object": self.kind, "choices": choices, "usage": usage}

    def usage(self, builders: Sequence[ResultBuilder]) -> Json:
        """Count tokens. A prompt with `n` choices counts once, with the cache hits of the first."""
        requests = [builder.request for builder in builders[:: self.body.n or 1]]
        num_prompt = sum(len(request.prompt) for request in requests)
        num_cached = sum(request.num_cached for request in requests)
        num_generated = sum(len(builder.tokens) for builder in builders)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def new_logprobs(self, i: int, builder: ResultBuilder) -> Json | None:
        """Return the logprobs not yet sent, or None if the request wants no logprobs."""
        if builder.request.sampling.logprobs is None:
            return None
        tokens = self.text_tokens(builder)[self._num_logprobs_sent[i] :]
        self._num_logprobs_sent[i] += len(tokens)
        return self.logprobs(i, tokens)

    def text_tokens(self, builder: ResultBuilder) -> list[Token]:
        """Return the tokens of the text, without the stop id or stop string at the end."""
        tokens, stop_ids = builder.tokens, builder.request.stop_ids
        if builder.finish_reason != "stop" or self.tokenizer is None:
            return tokens
        bytes_left, text_tokens = len(builder.text.encode()), []
        for token in tokens:
            if bytes_left <= 0 or token.id in stop_ids:
                break
            text_tokens.append(token)
            bytes_left -= len(self.tokenizer.decode_bytes([token.id]))
        return text_tokens

    def token_text(self, id: int) -> tuple[str, list[int]]:
        """Return a token as text and as bytes."""
        if self.tokenizer is None:
            return f"token_id:{id}", []
        data = self.tokenizer.decode_bytes([id])
        return data.decode(errors="replace"), [*data]

    def opening(self, i: int, builder: ResultBuilder) -> Iterator[Json]:
        """Yield the chunks before the first text of a choice."""
        raise NotImplementedError

    def text_fields(self, text: str) -> Json:
        """Return the fields of a chunk with text."""
        raise NotImplementedError

    def closing(self, i: int, builder: ResultBuilder) -> Iterator[Json]:
        """Yield the chunks after the last text of a choice."""
        raise NotImplementedError

    def choice_fields(self, builder: ResultBuilder) -> Json:
        """Return text or message of a whole choice, and the finish reason."""
        raise NotImplementedError

    def logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        """Return the logprobs of the next tokens of choice `i`."""
        raise NotImplementedError


class ChatFormatter(ResponseFormatter):
    """Formats the response to POST /v1/chat/completions."""

    body: ChatBody
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, i: int, builder: ResultBuilder) -> Iterator[Json]:
        yield self.chunk(i, {"delta": {"role": "assistant", "content": ""}})

    def text_fields(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def closing(self, i: int, builder: ResultBuilder) -> Iterator[Json]:
        if calls := self.tool_calls(builder):
            numbered = [{"index": index, **call} for index, call in enumerate(calls)]
            yield self.chunk(i, {"delta": {"tool_calls": numbered}})
        logprobs = self.new_logprobs(i, builder)
        if logprobs is not None and not logprobs["content"]:
            logprobs = None
        reason = "tool_calls" if calls else builder.finish_reason
        yield self.chunk(i, {"delta": {}}, logprobs, reason)

    def choice_fields(self, builder: ResultBuilder) -> Json:
        calls = self.tool_calls(builder)
        content = None if calls else builder.text
        message = {"role": "assistant", "content": content, "refusal": None}
        if not calls:
            return {"message": message, "finish_reason": builder.finish_reason}
        return {"message": {**message, "tool_calls": calls}, "finish_reason": "tool_calls"}

    def tool_calls(self, builder: ResultBuilder) -> list[Json]:
        """Return the tool calls with unique ids."""
        message = builder.result.message or {}
        functions = [call["function"] for call in message.get("tool_calls", ())]
        if self.body.parallel_tool_calls is False:
            functions = functions[:1]
        return [
            {
                "id": f"call_{token_hex(12)}",
                "type": "function",
                "function": {
                    "name": replace_surrogates(function["name"]),
                    "arguments": replace_surrogates(
                        json.dumps(function["arguments"], ensure_ascii=False)
                    ),
                },
            }
            for function in functions
        ]

    def logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        return {"content": [self._token_entry(token) for token in tokens], "refusal": None}

    def _token_entry(self, token: Token) -> Json:
        assert token.logprobs is not None
        top = [self._logprob_entry(id, logprob) for id, logprob in token.logprobs.top.items()]
        return {**self._logprob_entry(token.id, token.logprobs.chosen), "top_logprobs": top}

    def _logprob_entry(self, id: int, logprob: float) -> Json:
        text, data = self.token_text(id)
        return {"token": text, "logprob": clamp_logprob(logprob), "bytes": data}


class CompletionFormatter(ResponseFormatter):
    """Formats the response to POST /v1/completions."""

    body: CompletionBody
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def opening(self, i: int, builder: ResultBuilder) -> Iterator[Json]:
        if prompt := self.echoed_prompt(builder):
            yield self.chunk(i, self.text_fields(prompt))

    def text_fields(self, text: str) -> Json:
        return {"text": text}

    def closing(self, i: int, builder: ResultBuilder) -> Iterator[Json]:
        yield self.chunk(
            i, self.text_fields(""), self.new_logprobs(i, builder), builder.finish_reason
        )

    def choice_fields(self, builder: ResultBuilder) -> Json:
        text = self.echoed_prompt(builder) + builder.text
        return {**self.text_fields(text), "finish_reason": builder.finish_reason}

    def echoed_prompt(self, builder: ResultBuilder) -> str:
        """Return the prompt if the request has `echo`, else an empty string."""
        if not self.body.echo or self.tokenizer is None:
            return ""
        ids = list(builder.request.prompt)
        is_text = isinstance(self.body.prompts[0], str)
        added_bos = is_text and ids[:1] == [self.tokenizer.bos_id]
        return self.tokenizer.decode(ids[added_bos:])

    def logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        names = "tokens", "token_logprobs", "top_logprobs", "text_offset"
        columns: Json = {name: [] for name in names}
        for token in tokens:
            assert token.logprobs is not None
            text = self.token_text(token.id)[0]
            columns["tokens"].append(text)
            columns["text_offset"].append(self._text_offsets[i])
            self._text_offsets[i] += len(text)
            columns["token_logprobs"].append(clamp_logprob(token.logprobs.chosen))
            columns["top_logprobs"].append(
                {
                    self.token_text(id)[0]: clamp_logprob(logprob)
                    for id, logprob in token.logprobs.top.items()
                }
            )
        return columns


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates (valid in JSON, invalid in UTF-8) by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clamp_logprob(logprob: float) -> float:
    """Replace -inf, unknown to JSON, by -9999 as OpenAI does."""
    return max(logprob, -9999.0)
