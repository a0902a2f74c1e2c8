"""The KV cache, for someone to look at: which pages are free, held or remembered, and by whom."""

from collections.abc import Sequence
from itertools import count, groupby
from typing import Any
from weakref import WeakKeyDictionary

from llama32.engine.engine import Engine
from llama32.engine.request import Request


class Watch:
    """Looks at an engine between two steps. Requests are numbered in the order they are seen."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._choices: WeakKeyDictionary[Request, tuple[str, int]] = WeakKeyDictionary()
        self._next = count(1)

    def recognize(self, completion: str, requests: Sequence[Request]) -> None:
        """They are its choices: so its client, which knows it by this id, can tell them, too."""
        self._choices.update((one, (completion, i)) for i, one in enumerate(requests))

    def look(self) -> dict[str, Any]:
        """As JSON has it: `idle` and the `pages` of a request are runs of pages, [first, count].

        A page that several requests hold is in the runs of each.
        """
        view = self._engine.view()
        return {
            "pages": view.num_pages,
            "page_size": view.page_size,
            "idle": runs(view.idle),
            "waiting": view.num_waiting,
            "running": [self._tell(request, pages) for request, pages in view.held],
        }

    def _tell(self, request: Request, pages: Sequence[int]) -> dict[str, Any]:
        completion, choice = self._choices.get(request, (None, None))
        return {
            "number": self._number(request),
            "completion": completion,
            "choice": choice,
            "pages": runs(pages),
            "prompt": len(request.prompt),
            "cached": request.num_cached,
            "computed": request.num_computed,
            "generated": len(request.output),
        }

    def _number(self, request: Request) -> int:
        if request not in self._numbers:
            self._numbers[request] = next(self._next)
        return self._numbers[request]


def runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers that follow each other, as [first, count]."""
    together = groupby(enumerate(pages), lambda at: at[1] - at[0])
    found = [[page for _, page in run] for _, run in together]
    return [(run[0], len(run)) for run in found]
