"""The server's routes: OpenAI's, those that look at tokens, and those that look inside."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llama32.llm import LLM
from llama32.serve.answering import Answering
from llama32.serve.errors import ApiError, handle_errors
from llama32.serve.limits import careful
from llama32.serve.prompts import dialog_ids, prepare_chat, prepare_completion
from llama32.serve.replies import ChatReply, CompletionReply, Reply
from llama32.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from llama32.serve.service import Service
from llama32.serve.settings import ServeSettings

OWN = f"llama32-{version('llama32')}"


def create_app(llm: LLM, settings: ServeSettings | None = None, name: str = "llama32") -> FastAPI:
    """The server as an ASGI application; `name` is what clients call the model.

    Its engine is that of `llm`, and is closed when the application ends.
    """
    settings = settings or ServeSettings()
    service = Service(llm, settings, name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.engine.close()

    app = FastAPI(title="llama32", version=OWN, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    handle_errors(app)
    app.include_router(open_routes(service))
    route_class = careful(settings.max_body, settings.api_key)
    app.include_router(openai_routes(service, route_class))
    app.include_router(token_routes(service, route_class))
    app.include_router(inside_routes(service, route_class))
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(Counted, service=service)
    return app


def open_routes(service: Service) -> APIRouter:
    """For everyone: whether the server is well, and the page, which holds nothing by itself."""
    router = APIRouter()
    page = files("llama32.serve").joinpath("page.html").read_text("utf-8")

    @router.get("/health")
    async def health() -> Response:
        """200 as long as the model computes and the server means to go on; else 503, and why."""
        status, told = service.health
        return JSONResponse(told, status)

    @router.get("/", include_in_schema=False)
    async def look() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": ONLY_ITS_OWN})

    return router


ONLY_ITS_OWN = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
ONLY_ITS_OWN += "connect-src 'self'; img-src data:; "
ONLY_ITS_OWN += "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def openai_routes(service: Service, route_class: Any) -> APIRouter:
    """Those that OpenAI's clients know."""
    router = APIRouter(prefix="/v1", route_class=route_class)
    llm = service.llm

    @router.get("/models")
    async def models() -> Any:
        """What can be asked for as `model`: one model, under each of its names."""
        return {"object": "list", "data": [model_card(service, name) for name in service.names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> Any:
        """One of them."""
        service.check_model(name)
        return model_card(service, name)

    @router.post("/chat/completions")
    async def chat(body: ChatBody) -> Response:
        """The next message of a dialog; with `stream`, as server-sent events."""
        service.check_model(body.model)
        service.room.check(body.n or 1)
        prepared = await service.think(partial(prepare_chat, llm, body, service.capacity))
        return answer(ChatReply(body, llm.tokenizer, OWN), prepared)

    @router.post("/completions")
    async def complete(body: CompletionBody) -> Response:
        """How texts, or token ids, go on; with `stream`, as server-sent events."""
        service.check_model(body.model)
        service.room.check(len(body.prompts) * (body.n or 1))
        prepared = await service.think(partial(prepare_completion, llm, body, service.capacity))
        return answer(CompletionReply(body, llm.tokenizer, OWN), prepared)

    def answer(reply: Reply, prepared: Any) -> Response:
        if service.is_stopping:
            raise ApiError(503, "the server is shutting down")
        return Answering(service, prepared, reply)

    return router


def model_card(service: Service, name: str) -> dict[str, Any]:
    """As OpenAI lists a model. `max_model_len` is vLLM's."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llama32",
        "max_model_len": service.capacity,
    }


def token_routes(service: Service, route_class: Any) -> APIRouter:
    """Text to ids and back. (as vLLM has them)"""
    router = APIRouter(route_class=route_class)
    llm = service.llm

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Any:
        """The ids of a text, or of a dialog as the chat format writes it."""
        service.check_model(body.model)
        ids = await service.think(partial(to_ids, body))
        told = {"count": len(ids), "max_model_len": service.capacity, "tokens": ids}
        return JSONResponse(told)  # as it is: FastAPI would look at each of a million ids

    def to_ids(body: TokenizeBody) -> list[int]:
        if body.messages is not None:
            chat, template = llm.require_chat(), body.chat_template_kwargs
            return dialog_ids(chat, body.messages, body.tools, template, body.add_generation_prompt)
        tokenizer = llm.require_tokenizer()
        bos = body.add_special_tokens and tokenizer.bos_id is not None
        return tokenizer.encode(body.prompt or "", bos=bos)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Any:
        """The text of ids."""
        service.check_model(body.model)
        return {"prompt": await service.think(lambda: llm.require_tokenizer().decode(body.tokens))}

    return router


def inside_routes(service: Service, route_class: Any) -> APIRouter:
    """What goes on inside."""
    router = APIRouter(route_class=route_class)

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = await service.think(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/cache")
    async def cache() -> Any:
        """The pages of the KV cache and who holds them, as they are now."""
        return await service.think(service.watch.look)

    return router


class Counted:
    """Counts responses, by the route that made them."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def count(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.service.metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, count)
