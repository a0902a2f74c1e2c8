"""The response to a completion: streams during generation, aborts when the client disconnects."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llama32.engine.async_engine import Subscriber
from llama32.llm.prompt import PreparedPrompt
from llama32.llm.result import ResultBuilder
from llama32.serve.errors import ApiError
from llama32.serve.limits import wait_for_disconnect
from llama32.serve.responses import Json, ResponseFormatter
from llama32.serve.service import Service, StoppingError, client_errors, log


class ChoiceUpdate(NamedTuple):
    """Progress of one choice."""

    index: int
    builder: ResultBuilder
    new_text: str


class CompletionResponse(Response):
    """Runs prepared prompts and sends the results in the format of `formatter`.

    Aborts the requests when the client disconnects. The response starts with the first token: an
    earlier error sets the HTTP status, and a later error is the last event of the stream.
    """

    def __init__(
        self, service: Service, prepared: Sequence[PreparedPrompt], formatter: ResponseFormatter
    ) -> None:
        super().__init__()
        self.service = service
        self.prepared = prepared
        self.formatter = formatter
        self.builders: list[ResultBuilder] = []
        self.start_time = perf_counter()
        self.first_token_seconds: float | None = None  # None before the first token
        self._is_streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, or stop when the client disconnects. Called by ASGI."""
        respond = asyncio.create_task(self._respond(scope, receive, send))
        disconnect = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait((respond, disconnect), return_when=asyncio.FIRST_COMPLETED)
            has_disconnected = not respond.done()
        finally:
            disconnect.cancel()
            respond.cancel()
        try:
            await respond
        except asyncio.CancelledError:
            if not has_disconnected:
                raise

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._generate(scope, receive, send)
        except ApiError as error:
            if not self._is_streaming:
                raise
            await self._send_events(send, error.body, is_last=True)
        finally:
            self._record_metrics()

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine, timeout = self.service.engine, self.service.settings.timeout
        adds = [partial(prompt.add, engine.engine) for prompt in self.prepared]
        try:
            with self.service.slots.reserve(len(adds)), engine.subscribe(*adds) as subscriber:
                async with asyncio.timeout(timeout):
                    with client_errors():
                        await subscriber.wait_until_added()
                    await self._send_results(subscriber, scope, receive, send)
        except TimeoutError:
            message = f"the request took longer than this server allows: {timeout:g} seconds"
            raise ApiError(504, message) from None

    async def _send_results(
        self, subscriber: Subscriber, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.builders = [
            ResultBuilder(request, self.service.llm.tokenizer, prompt.chat)
            for prompt, request in zip(self.prepared, subscriber.requests, strict=True)
        ]
        self.service.cache_view.register(self.formatter.id, subscriber.requests)
        async for updates in self._updates(subscriber):
            if self.formatter.body.stream:
                chunks = [chunk for update in updates for chunk in self.formatter.chunks(*update)]
                await self._send_events(send, *chunks)
        if not self.formatter.body.stream:
            headers = {"x-request-id": self.formatter.id}
            response = JSONResponse(self.formatter.response(self.builders), headers=headers)
            await response(scope, receive, send)
            return
        if self.formatter.wants_usage:
            await self._send_events(send, self.formatter.usage_chunk(self.builders))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _updates(self, subscriber: Subscriber) -> AsyncIterator[list[ChoiceUpdate]]:
        """Yield the changed choices after each step, until all choices have ended."""
        running = dict(enumerate(self.builders))
        while running:
            updates: list[ChoiceUpdate] = []
            for i, builder in [*running.items()]:
                num_tokens = len(builder.tokens)
                new_text = builder.update()
                if builder.is_finished:
                    del running[i]
                    self._finish_choice(builder)
                if builder.is_finished or len(builder.tokens) > num_tokens:
                    updates.append(ChoiceUpdate(i, builder, new_text))
            if updates:
                self.first_token_seconds = self.first_token_seconds or self._elapsed()
                yield updates
            if running:
                await subscriber.wait_for_update()

    def _finish_choice(self, builder: ResultBuilder) -> None:
        """End the request of a finished choice. Raises ApiError if the request failed."""
        request = builder.request
        if request.finish_reason is None:  # after a stop string the request still runs
            self.service.engine.abort(request)
        if isinstance(request.error, StoppingError) or builder.finish_reason == "abort":
            raise ApiError(503, "the server is shutting down")
        if request.error is not None:
            # A ValueError is the client's fault, for example a grammar that is too large.
            status = 400 if isinstance(request.error, ValueError) else 500
            raise ApiError(status, f"the request failed: {request.error}")

    async def _send_events(self, send: Send, *chunks: Json, is_last: bool = False) -> None:
        """Send chunks as server-sent events; the first call also sends the headers."""
        if not self._is_streaming:
            fields = {**STREAM_HEADERS, "x-request-id": self.formatter.id}
            headers = [(name.encode(), value.encode()) for name, value in fields.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self._is_streaming = True
        events = b"".join(b"data: %b\n\n" % to_json(chunk) for chunk in chunks)
        await send({"type": "http.response.body", "body": events, "more_body": not is_last})

    def _elapsed(self) -> float:
        return perf_counter() - self.start_time

    def _record_metrics(self) -> None:
        """Update metrics and log; prompt and output texts are logged only with `log_prompts`."""
        metrics, seconds = self.service.metrics, self._elapsed()
        metrics.request_seconds.observe(seconds)
        if self.first_token_seconds is not None:
            metrics.first_token_seconds.observe(self.first_token_seconds)
        for builder in self.builders:
            request, reason = builder.request, builder.finish_reason or "abort"
            metrics.completions.labels(reason).inc()
            metrics.prompt_tokens.observe(len(request.prompt))
            metrics.completion_tokens.observe(len(builder.tokens))
            log.info(
                "%s: %d prompt tokens, %d cached, %d generated in %.2f s: %s",
                self.formatter.id,
                len(request.prompt),
                request.num_cached,
                len(builder.tokens),
                seconds,
                reason,
            )
            if self.service.settings.log_prompts and self.service.llm.tokenizer:
                prompt = self.service.llm.tokenizer.decode(request.prompt)
                log.info("%s: %r -> %r", self.formatter.id, prompt, builder.text)


STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
