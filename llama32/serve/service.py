"""State shared by all requests: model, engine, request slots, metrics."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from llama32.engine.async_engine import AsyncEngine
from llama32.llm.llm import LLM
from llama32.serve.cache_view import CacheView
from llama32.serve.errors import ApiError
from llama32.serve.limits import RequestSlots
from llama32.serve.metrics import Metrics
from llama32.serve.settings import ServeSettings

T = TypeVar("T")
log = logging.getLogger("llama32.serve")


class Service:
    """A served model. Clients may use any of `names`; the first is the main name."""

    def __init__(self, llm: LLM, settings: ServeSettings, name: str) -> None:
        self.llm = llm
        self.settings = settings
        self.names = settings.served_model_name or [name]
        engine = llm.engine
        self.engine = AsyncEngine(engine)
        self.slots = RequestSlots(llm.engine_settings.max_running + settings.queue)
        self.metrics = Metrics(engine)
        self.cache_view = CacheView(engine)
        self.is_stopping = False
        self.created = int(time.time())
        cache = engine.snapshot()
        num_slots = cache.num_pages * cache.page_size
        self.max_length = min(llm.config.max_position_embeddings, num_slots)  # tokens of a request

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 if a client asks for another model."""
        if name is not None and name not in self.names:
            served = ", ".join(self.names)
            raise ApiError(
                404,
                f"the model {ascii(name)[:100]} does not exist; this server has {served}",
                param="model",
                code="model_not_found",
            )

    @property
    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of the response to `/health`."""
        if self.is_stopping:
            return 503, {"status": "stopping"}
        if self.engine.error is not None:
            return 503, {"status": "failing", "error": repr(self.engine.error)}
        return 200, {"status": "ok"}

    async def run_in_thread(self, function: Callable[[], T]) -> T:
        """Run a slow function in a thread. Its ValueErrors become ApiErrors with status 400."""
        with client_errors():
            return await asyncio.to_thread(function)

    def abort_all(self) -> None:
        """End all requests with a StoppingError, because the time to drain is over."""
        self.engine.fail(StoppingError("the server is shutting down"))


class StoppingError(RuntimeError):
    """The server ended a request in order to stop."""


@contextmanager
def client_errors() -> Iterator[None]:
    """Turn a ValueError into an ApiError with status 400."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from None
