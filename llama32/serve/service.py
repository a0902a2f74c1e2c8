"""What all requests to a server share: the model and its engine, the room there is, the counts."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from llama32.engine.asynchronous import AsyncEngine
from llama32.llm import LLM
from llama32.serve.errors import ApiError
from llama32.serve.limits import Room
from llama32.serve.metrics import Metrics
from llama32.serve.settings import ServeSettings
from llama32.serve.watch import Watch

T = TypeVar("T")
log = logging.getLogger("llama32.serve")


class Service:
    """One model, served. `names` are what clients may call it, the first what it is called."""

    def __init__(self, llm: LLM, settings: ServeSettings, name: str) -> None:
        self.llm = llm
        self.settings = settings
        self.names = settings.served_model_name or [name]
        engine = llm.engine
        self.engine = AsyncEngine(engine)
        self.room = Room(llm.engine_settings.max_running + settings.queue)
        self.metrics = Metrics(engine)
        self.watch = Watch(engine)
        self.is_stopping = False
        self.created = int(time.time())
        cache = engine.view()
        room = cache.num_pages * cache.page_size
        self.capacity = min(llm.config.max_position_embeddings, room)  # tokens of a request

    def check_model(self, name: str | None) -> None:
        """ApiError where a client asks for another model."""
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
        """The status, and what there is to say."""
        if self.is_stopping:
            return 503, {"status": "stopping"}
        if self.engine.error is not None:
            return 503, {"status": "failing", "error": repr(self.engine.error)}
        return 200, {"status": "ok"}

    async def think(self, work: Callable[[], T]) -> T:
        """Done in another thread, since it takes time. What it finds wrong is the client's."""
        with blamed():
            return await asyncio.to_thread(work)

    def cut(self) -> None:
        """The time to drain is over: end all that still runs."""
        self.engine.fail(StoppingError("the server is shutting down"))


class StoppingError(RuntimeError):
    """Why a request was ended."""


@contextmanager
def blamed() -> Iterator[None]:
    """A ValueError is the client's affair."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from None
