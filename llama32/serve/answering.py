"""A response that is made while the model runs, for as long as the client is there."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from time import perf_counter

from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llama32.engine.asynchronous import Listener
from llama32.llm import Prepared
from llama32.serve.errors import ApiError
from llama32.serve.limits import gone
from llama32.serve.replies import Json, Reply
from llama32.serve.service import Service, StoppingError, blamed, log
from llama32.transcript import Transcript

Change = tuple[int, Transcript, str]  # of a choice: its number, what it is now, its new text


class Answering(Response):
    """Runs what is prepared, and tells the client of it in the shapes of `reply`.

    When the client leaves, what it asked for is aborted. The response begins with the first token,
    so that what goes wrong before has a status of its own; what goes wrong later is the last event
    of the stream.
    """

    def __init__(self, service: Service, prepared: Sequence[Prepared], reply: Reply) -> None:
        super().__init__()
        self.service = service
        self.prepared = prepared
        self.reply = reply
        self.transcripts: list[Transcript] = []
        self.began = perf_counter()
        self.first_token: float | None = None  # seconds until it came
        self._is_streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls a response."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        left = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            has_left = not work.done()
        finally:
            left.cancel()
            work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            if not has_left:
                raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._run(scope, receive, send)
        except ApiError as error:
            if not self._is_streaming:
                raise
            await self._send(send, error.body, is_last=True)
        finally:
            self._count()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self.service.engine
        adds = [partial(one.add, engine.engine) for one in self.prepared]
        try:
            with self.service.room.take(len(adds)), engine.listen(*adds) as listener:
                async with asyncio.timeout(self.service.settings.timeout):
                    with blamed():
                        await listener.added()
                    await self._follow(listener, scope, receive, send)
        except TimeoutError:
            raise ApiError(504, "the request took longer than this server allows") from None

    async def _follow(self, listener: Listener, scope: Scope, receive: Receive, send: Send) -> None:
        self.transcripts = [
            Transcript(request, self.service.llm.tokenizer, one.chat)
            for one, request in zip(self.prepared, listener.requests, strict=True)
        ]
        self.service.watch.recognize(self.reply.frame["id"], listener.requests)
        async for changes in self._changes(listener):
            if self.reply.body.stream:
                chunks = [chunk for change in changes for chunk in self.reply.chunks(*change)]
                await self._send(send, *chunks)
        if not self.reply.body.stream:
            whole = self.reply.whole(self.transcripts)
            headers = {"x-request-id": self.reply.frame["id"]}
            await JSONResponse(whole, headers=headers)(scope, receive, send)
            return
        if self.reply.wants_usage:
            await self._send(send, self.reply.usage_chunk(self.transcripts))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _changes(self, listener: Listener) -> AsyncIterator[list[Change]]:
        """What has changed, each time that something has, until all have ended."""
        running = dict(enumerate(self.transcripts))
        while running:
            changes: list[Change] = []
            for i, transcript in [*running.items()]:
                seen = len(transcript.tokens)
                piece = transcript.catch_up()
                if transcript.has_ended:
                    del running[i]
                    self._check(transcript)
                if transcript.has_ended or len(transcript.tokens) > seen:
                    changes.append((i, transcript, piece))
            if changes:
                self.first_token = self.first_token or perf_counter() - self.began
                yield changes
            if running:
                await listener.change()

    def _check(self, transcript: Transcript) -> None:
        """A choice has ended: let its request end, too. ApiError where something ended it."""
        request = transcript.request
        if request.finish_reason is None:  # it is at a stop string, and would go on
            self.service.engine.abort(request)
        if isinstance(request.error, StoppingError) or transcript.reason == "abort":
            raise ApiError(503, "the server is shutting down")
        if request.error is not None:
            is_theirs = isinstance(request.error, ValueError)  # their grammar has grown too large
            raise ApiError(400 if is_theirs else 500, f"the request failed: {request.error}")

    async def _send(self, send: Send, *chunks: Json, is_last: bool = False) -> None:
        """Events of a stream, which the first ones begin."""
        if not self._is_streaming:
            told = {**STREAM_HEADERS, "x-request-id": self.reply.frame["id"]}
            headers = [(name.encode(), value.encode()) for name, value in told.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self._is_streaming = True
        events = b"".join(b"data: %b\n\n" % to_json(chunk) for chunk in chunks)
        await send({"type": "http.response.body", "body": events, "more_body": not is_last})

    def _count(self) -> None:
        """For the metrics and the log, which has no text in it unless that is wanted."""
        metrics, seconds = self.service.metrics, perf_counter() - self.began
        metrics.seconds.observe(seconds)
        if self.first_token is not None:
            metrics.first_token.observe(self.first_token)
        for transcript in self.transcripts:
            reason = transcript.reason or "abort"
            metrics.completions.labels(reason).inc()
            metrics.prompt.observe(len(transcript.request.prompt))
            metrics.generated.observe(len(transcript.tokens))
            log.info(
                "%s: %d prompt tokens, %d of them cached, %d generated in %.2f s: %s",
                self.reply.frame["id"],
                len(transcript.request.prompt),
                transcript.request.num_cached,
                len(transcript.tokens),
                seconds,
                reason,
            )
            if self.service.settings.log_prompts and self.service.llm.tokenizer:
                asked = self.service.llm.tokenizer.decode(transcript.request.prompt)
                log.info("%s: %r -> %r", self.reply.frame["id"], asked, transcript.text)


STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
