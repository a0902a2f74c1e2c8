"""A JSON view of the KV cache: pages, and the requests that use each page."""

from collections.abc import Sequence
from itertools import count, groupby
from typing import Any
from weakref import WeakKeyDictionary

from llama32.engine.engine import Engine
from llama32.engine.request import Request


class CacheView:
    """Reads the KV cache of an engine between two steps.

    Numbers the requests in the order in which snapshots first contain them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._choices: WeakKeyDictionary[Request, tuple[str, int]] = WeakKeyDictionary()
        self._next_number = count(1)

    def register(self, completion_id: str, requests: Sequence[Request]) -> None:
        """Record the requests as the choices of a completion.

        The client knows the id and can find the requests in a snapshot.
        """
        self._choices.update(
            (request, (completion_id, choice)) for choice, request in enumerate(requests)
        )

    def snapshot(self) -> dict[str, Any]:
        """Return the JSON of `/cache`. Page numbers are in runs, [first, count].

        A shared page is in the runs of every request that uses the page. `idle` equals `evictable`
        and is deprecated, for removal in release 0.3.
        """
        cache = self._engine.snapshot()
        evictable = page_runs(cache.evictable)
        return {
            "pages": cache.num_pages,
            "page_size": cache.page_size,
            "evictable": evictable,
            "idle": evictable,  # deprecated
            "waiting": cache.num_waiting,
            "running": [self._request_fields(request, pages) for request, pages in cache.running],
        }

    def _request_fields(self, request: Request, pages: Sequence[int]) -> dict[str, Any]:
        completion_id, choice = self._choices.get(request, (None, None))
        return {
            "number": self._number(request),
            "completion": completion_id,
            "choice": choice,
            "pages": page_runs(pages),
            "prompt": len(request.prompt),
            "cached": request.num_cached,
            "computed": request.num_computed,
            "generated": len(request.output),
        }

    def _number(self, request: Request) -> int:
        if request not in self._numbers:
            self._numbers[request] = next(self._next_number)
        return self._numbers[request]


def page_runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Compress page numbers into runs of consecutive numbers, [first, count]."""
    groups = groupby(enumerate(pages), lambda item: item[1] - item[0])
    runs = [[page for _, page in group] for _, group in groups]
    return [(run[0], len(run)) for run in runs]
