"""The ASGI application: routes of OpenAI's API, of the tokenizer, and for inspection."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llama32.llm.llm import LLM
from llama32.llm.prompt import PreparedPrompt
from llama32.serve.errors import ApiError, handle_errors
from llama32.serve.limits import guarded_route
from llama32.serve.prepare import dialog_ids, prepare_chat, prepare_completion
from llama32.serve.responses import ChatFormatter, CompletionFormatter, ResponseFormatter
from llama32.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from llama32.serve.service import Service
from llama32.serve.settings import ServeSettings
from llama32.serve.streaming_response import CompletionResponse

SYSTEM_FINGERPRINT = f"llama32-{version('llama32')}"


def create_app(llm: LLM, settings: ServeSettings | None = None, name: str = "llama32") -> FastAPI:
    """Return the server as an ASGI application; `name` is the model name for clients.

    The application uses the engine of `llm` and closes the engine on shutdown.
    """
    settings = settings or ServeSettings()
    service = Service(llm, settings, name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.engine.close()

    app = FastAPI(
        title="llama32",
        version=SYSTEM_FINGERPRINT,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    handle_errors(app)
    app.include_router(public_routes(service))
    route_class = guarded_route(settings.max_body, settings.api_key)
    app.include_router(openai_routes(service, route_class))
    app.include_router(token_routes(service, route_class))
    app.include_router(inspection_routes(service, route_class))
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(CountResponses, service=service)
    return app


def public_routes(service: Service) -> APIRouter:
    """Return the routes without API key: the health check, and the page, which holds no data."""
    router = APIRouter()
    page = files("llama32.serve").joinpath("page.html").read_text("utf-8")

    @router.get("/health")
    async def health() -> Response:
        """Report status 200, or 503 with a reason when a step failed or the server is stopping."""
        status, body = service.health
        return JSONResponse(body, status)

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_CSP})

    return router


PAGE_CSP = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
PAGE_CSP += "connect-src 'self'; img-src data:; "
PAGE_CSP += "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def openai_routes(service: Service, route_class: Any) -> APIRouter:
    """Return the routes of OpenAI's API."""
    router = APIRouter(prefix="/v1", route_class=route_class)
    llm = service.llm

    @router.get("/models")
    async def models() -> Any:
        """List the served model under each name."""
        return {"object": "list", "data": [model_card(service, name) for name in service.names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> Any:
        """Look up the served model by name."""
        service.check_model(name)
        return model_card(service, name)

    @router.post("/chat/completions")
    async def chat(body: ChatBody) -> Response:
        """Generate the next message of a dialog; with `stream`, as server-sent events."""
        service.check_model(body.model)
        service.slots.check(body.n or 1)
        prepared = await service.run_in_thread(partial(prepare_chat, llm, body, service.max_length))
        return respond(ChatFormatter(body, llm.tokenizer, SYSTEM_FINGERPRINT), prepared)

    @router.post("/completions")
    async def complete(body: CompletionBody) -> Response:
        """Continue texts or token ids; with `stream`, as server-sent events."""
        service.check_model(body.model)
        service.slots.check(len(body.prompts) * (body.n or 1))
        prepared = await service.run_in_thread(
            partial(prepare_completion, llm, body, service.max_length)
        )
        return respond(CompletionFormatter(body, llm.tokenizer, SYSTEM_FINGERPRINT), prepared)

    def respond(formatter: ResponseFormatter, prepared: Sequence[PreparedPrompt]) -> Response:
        if service.is_stopping:
            raise ApiError(503, "the server is shutting down")
        return CompletionResponse(service, prepared, formatter)

    return router


def model_card(service: Service, name: str) -> dict[str, Any]:
    """Return the model object of OpenAI's API; `max_model_len` is a field of vLLM's server."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llama32",
        "max_model_len": service.max_length,
    }


def token_routes(service: Service, route_class: Any) -> APIRouter:
    """Return the routes from text to token ids and back (as in vLLM)."""
    router = APIRouter(route_class=route_class)
    llm = service.llm

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Any:
        """Encode a text, or a dialog in the chat format."""
        service.check_model(body.model)
        ids = await service.run_in_thread(partial(to_ids, body))
        fields = {"count": len(ids), "max_model_len": service.max_length, "tokens": ids}
        return JSONResponse(fields)  # FastAPI would validate each of a million ids

    def to_ids(body: TokenizeBody) -> list[int]:
        if body.messages is not None:
            chat, template = llm.require_chat(), body.chat_template_kwargs
            return dialog_ids(chat, body.messages, body.tools, template, body.add_generation_prompt)
        tokenizer = llm.require_tokenizer()
        bos = body.add_special_tokens and tokenizer.bos_id is not None
        return tokenizer.encode(body.prompt or "", bos=bos)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Any:
        """Decode token ids."""
        service.check_model(body.model)
        decode = partial(to_text, body.tokens)
        return {"prompt": await service.run_in_thread(decode)}

    def to_text(ids: list[int]) -> str:
        return llm.require_tokenizer().decode(ids)

    return router


def inspection_routes(service: Service, route_class: Any) -> APIRouter:
    """Return the routes to inspect the engine."""
    router = APIRouter(route_class=route_class)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Report metrics in Prometheus' text format."""
        text = await service.run_in_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/cache")
    async def cache() -> Any:
        """Report the pages of the KV cache, and the running requests with the pages in use.

        The field `idle` is deprecated, for removal in release 0.3: use `evictable`.
        """
        return await service.run_in_thread(service.cache_view.snapshot)

    return router


class CountResponses:
    """ASGI middleware: count responses by route and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_and_count(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.service.metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, send_and_count)
