"""The scheduler: what the next step computes. Plain decisions over lists, without tensors.

Every running request whose prompt is computed gets its next token in every step. In addition, a
step computes up to `prefill_tokens` prompt tokens, oldest request first. Long prompts therefore
neither wait for long answers nor delay them.

Requests start in order of arrival. If a running request needs a page and no page is available, the
youngest running request is preempted: its pages are released (cached pages become evictable), the
request returns to the head of the queue, and its tokens are computed again once pages are
available. The oldest request is never preempted, so it always ends, and the next request becomes
the oldest. Hence all requests end.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama32.engine.page_allocator import PageAllocator
from llama32.engine.prefix_cache import PrefixCache, page_keys
from llama32.engine.request import Request
from llama32.engine.stats import CacheSnapshot

# Prompt chunks end at multiples of the tile size of attention (`paged_attention.QUERY_TILE`).
PREFILL_ALIGNMENT = 64


class Chunk(NamedTuple):
    """Tokens of a request to compute, from `start` up to `stop`."""

    request: Request
    start: int
    stop: int


class ScheduledStep(NamedTuple):
    """The work of a step: prefill chunks without logits, then decode rows.

    A decode chunk has a row per token. The row of the last known token gives the next token.
    A chunk of several rows replays the generated tokens of a preempted request, or has drafts after
    the last known token; each draft row may give one more token. A request is in both lists in the
    step that completes its prompt.
    """

    prefill: Sequence[Chunk]
    decode: Sequence[Chunk]


class Scheduler:
    """Queues requests, allocates pages and schedules steps.

    For each step: schedule(), run the step, advance(step), append() tokens to requests, finish()
    the requests that end. Only `advance` changes the progress of a request, so a step that failed
    can be scheduled again. Between schedule and run, reserve_drafts() allocates slots for drafts.
    `on_release(request)` is called when a running request ends or is preempted.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        max_running: int = 64,
        prefill_tokens: int = 512,
        alignment: int = PREFILL_ALIGNMENT,
        on_release: Callable[[Request], object] = lambda request: None,
    ) -> None:
        if prefill_tokens < alignment or page_size % alignment:
            raise ValueError(
                f"prefill_tokens ({prefill_tokens}) must be at least {alignment}, and page_size "
                f"({page_size}) a multiple of {alignment}: prompts are computed in tiles of "
                f"{alignment} tokens"
            )
        self.prefix_cache = PrefixCache()
        self.pages = PageAllocator(num_pages, on_evict=self.prefix_cache.evict)
        self.page_size = page_size
        self.max_running = max_running
        self.prefill_tokens = prefill_tokens
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._requests_with_drafts: list[Request] = []  # since the last schedule()
        self._alignment = alignment
        self._on_release = on_release
        self._pending: dict[int, Request] = {}  # page digest -> running request that fills the page

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if the whole cache is too small for the request."""
        needed, num_pages = self._pages_for(request.max_length), len(self.pages.ref_counts)
        if needed > num_pages:
            raise ValueError(
                f"the request may need {request.max_length} tokens ({len(request.prompt)} of "
                f"prompt), {needed} pages of {self.page_size}, and the KV cache has {num_pages} in "
                f"all: ask for fewer tokens, or enlarge the cache (cache_tokens)"
            )
        request.keys = page_keys(request.prompt[: request.num_prefill_tokens], self.page_size)
        self.waiting[request] = None

    def finish(self, request: Request, *, invalidate: bool = False) -> None:
        """Remove a waiting or running request and release its pages.

        With `invalidate`, the pages leave the prefix cache too, because the content is invalid.
        """
        if request in self.waiting:
            del self.waiting[request]
        elif request in self.running:
            self.running.remove(request)
            for page in request.pages if invalidate else ():
                if page in self.prefix_cache:
                    self.prefix_cache.evict(page)
            self._release(request)

    def schedule(self) -> ScheduledStep:
        """Return the next step; empty if there is nothing to compute."""
        self._release_drafts()
        if self._ensure_decode_pages():
            self._admit()
        prefill: list[Chunk] = []
        decode: list[Chunk] = []
        budget = self.prefill_tokens
        for request in self.running:
            start, end = request.num_computed, request.num_prefill_tokens
            if start < end:
                stop = end if end - start <= budget else self._align_down(start + budget)
                if start < stop:
                    prefill.append(Chunk(request, start, stop))
                    budget -= stop - start
                    start = stop
            if start >= end:  # the prompt is complete: decode one row, or replay several
                stop = min(request.length, start + 1 + budget)
                decode.append(Chunk(request, start, stop))
                budget -= stop - start - 1
        return ScheduledStep(prefill, decode)

    def reserve_drafts(self, request: Request, count: int) -> int:
        """Allocate slots for up to `count` drafts of a scheduled request; return the number.

        The number is also limited by the tokens that the request may still get after the next
        token, and by the slots available without eviction. The next schedule() releases the pages
        first, so drafts never delay or preempt a request.
        """
        self._requests_with_drafts.append(request)
        count = min(count, request.max_length - request.length - 1)
        missing = self._pages_for(request.length + count) - len(request.pages)
        if (num_pages := min(missing, self.pages.num_free)) > 0:
            request.pages += self.pages.allocate(num_pages, request.pages[-1])
        return max(0, min(count, len(request.pages) * self.page_size - request.length))

    def advance(self, step: ScheduledStep) -> None:
        """Record that the step has run: count computed tokens, and share full prompt pages."""
        for request, start, stop in (*step.prefill, *step.decode):
            request.num_computed = min(stop, request.length)  # drafts are not verified yet
            for i in range(start // self.page_size, min(stop // self.page_size, len(request.keys))):
                previous = request.pages[i - 1] if i else None
                self.prefix_cache.insert(request.keys[i], request.pages[i], previous)
                self._pending.pop(request.keys[i].digest, None)

    def clear_prefix_cache(self) -> None:
        """Remove all cached prefixes, because the model has changed."""
        for page in self.prefix_cache.clear():
            if self.pages.is_evictable(page):
                self.pages.discard(page)
        self._pending.clear()
        for request in self.running:
            request.keys = ()  # the next full page may hold keys and values of both models

    def snapshot(self) -> CacheSnapshot:
        """Return the pages of each running request, and the evictable pages."""
        return CacheSnapshot(
            num_pages=len(self.pages.ref_counts),
            page_size=self.page_size,
            evictable=self.pages.evictable_pages,
            running=[(request, [*request.pages]) for request in self.running],
            num_waiting=len(self.waiting),
        )

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _align_down(self, stop: int) -> int:
        return stop // self._alignment * self._alignment

    def _release_drafts(self) -> None:
        """Remove the drafts of the last step, and release pages that only drafts used."""
        for request in self._requests_with_drafts:
            request.drafts = ()
            needed = self._pages_for(request.length)
            for page in reversed(request.pages[needed:]):
                self.pages.decref(page, keep_cached=False)
            del request.pages[needed:]
        self._requests_with_drafts.clear()

    def _ensure_decode_pages(self) -> bool:
        """Allocate pages for the next token of all running requests; False if any was preempted."""
        num_running = len(self.running)
        for request in tuple(self.running):
            missing = self._pages_for(request.length) - len(request.pages)
            while missing > self.pages.num_available and request in self.running:
                self._preempt(self.running[-1])
            if missing > 0 and request in self.running:
                request.pages += self.pages.allocate(missing, request.pages[-1])
        return len(self.running) == num_running

    def _preempt(self, request: Request) -> None:
        """Release the pages of a request and return the request to the head of the queue."""
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)

    def _release(self, request: Request) -> None:
        # Last page first: pages are evicted in the order of release, and a cached page without its
        # predecessor could not be found.
        for page in reversed(request.pages):
            self.pages.decref(page, keep_cached=page in self.prefix_cache)
        request.pages.clear()
        request.drafts = ()
        self._on_release(request)
        for key in request.keys:
            if self._pending.get(key.digest) is request:
                del self._pending[key.digest]

    def _admit(self) -> None:
        """Start requests from the head of the queue while there is room."""
        while self.waiting and len(self.running) < self.max_running:
            request = next(iter(self.waiting))
            if not self._try_allocate(request):
                return
            del self.waiting[request]
            self.running.append(request)

    def _try_allocate(self, request: Request) -> bool:
        """Allocate pages for all known tokens of a request; False if the request must wait."""
        cached = self.prefix_cache.match(request.keys)
        missing = request.keys[len(cached) :]
        if missing and missing[0].digest in self._pending:
            return False  # a running request is about to compute the page: wait and share
        needed = self._pages_for(request.length) - len(cached)
        reused = sum(map(self.pages.is_evictable, cached))
        reserve = len(self.running)  # one spare page per running request, to avoid preemption
        if needed + reused + reserve > self.pages.num_available:
            return False
        self.pages.incref(cached)
        room = self._pages_for(request.max_length)
        request.pages = cached + self.pages.allocate(needed, cached[-1] if cached else None, room)
        request.num_computed = len(cached) * self.page_size
        if not request.num_preemptions:
            request.num_cached = request.num_computed
        self._pending.update((key.digest, request) for key in missing)
        return True
