"""What the next step computes: plain decisions over lists, without a tensor.

Every running request gets its next token in every step, whatever else there is to do. Besides, a
step computes up to a budget of prompt tokens, the oldest request's first, so that long prompts
neither wait for long answers nor hold them up.

Requests start in the order they came in. One that finds no page for its next token sends the
youngest back to wait at the head of the queue, where its pages are taken and, once there is room,
computed again. The oldest is never sent back, so it ends; then the next one is the oldest. Hence
all end.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama32.engine.pages import Pages
from llama32.engine.prefix import Prefixes, page_keys
from llama32.engine.request import Request
from llama32.engine.stats import View

BLOCK = 64  # prompts are cut at multiples of this, as their attention is (`paged.QUERY_BLOCK`)


class Work(NamedTuple):
    """Tokens of one request to compute, from `start` up to `stop`."""

    request: Request
    start: int
    stop: int


class Step(NamedTuple):
    """One step: first the prompts, then the rows whose last gives each request its next token.

    A request can be in both, when its prompt is read to the end. More than one row of a request
    is in `decode` where it was sent back: its generated tokens are computed again, as before. Or
    where there are drafts, which come behind its last known token: each row gives a token then.
    """

    prefill: Sequence[Work]
    decode: Sequence[Work]


class Scheduler:
    """Queues requests, hands out pages, and plans step after step.

    plan() -> Step, run it, then advance(step), append() tokens to the requests, finish() what
    ended. A step that was planned and failed can be planned again: only `advance` moves a request
    on. Between plan and run, reserve() makes room for drafts. `on_release` is told of every
    request that gives back its pages, because it has ended or is sent back to wait.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        max_running: int = 64,
        prefill_tokens: int = 512,
        block: int = BLOCK,
        on_release: Callable[[Request], object] = lambda request: None,
    ) -> None:
        if prefill_tokens < block or page_size % block:
            raise ValueError(
                f"prefill_tokens ({prefill_tokens}) must be at least {block}, and the page size "
                f"({page_size}) a multiple of it: prompts are computed in blocks of that size"
            )
        self.prefixes = Prefixes()
        self.pages = Pages(num_pages, on_evict=self.prefixes.forget)
        self.page_size = page_size
        self.max_running = max_running
        self.prefill_tokens = prefill_tokens
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._drafted: list[Request] = []  # since the last plan
        self._block = block
        self._on_release = on_release
        self._pending: dict[int, Request] = {}  # digests of pages that a running prompt will fill

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if the whole cache could not hold it."""
        needed, there = self._pages_for(request.longest), len(self.pages.references)
        if needed > there:
            raise ValueError(
                f"the request may come to {request.longest} tokens ({len(request.prompt)} of "
                f"prompt), {needed} pages of {self.page_size}, and the KV cache has {there} in "
                f"all: ask for fewer tokens, or make it larger (cache_tokens)"
            )
        request.keys = page_keys(request.prompt[: request.num_prefill], self.page_size)
        self.waiting[request] = None

    def finish(self, request: Request, *, distrust: bool = False) -> None:
        """The request is over, whatever it was doing; its pages are free at once. `distrust` what
        is in them: nobody else shall begin with it."""
        if request in self.waiting:
            del self.waiting[request]
        elif request in self.running:
            self.running.remove(request)
            for page in request.pages if distrust else ():
                if page in self.prefixes:
                    self.prefixes.forget(page)
            self._give_back(request)

    def plan(self) -> Step:
        """The next step; empty when there is nothing to do."""
        self._drop_drafts()
        if self._make_room():
            self._admit()
        prefill: list[Work] = []
        decode: list[Work] = []
        budget = self.prefill_tokens
        for request in self.running:
            start, end = request.num_computed, request.num_prefill
            if start < end:
                stop = end if end - start <= budget else self._cut(start + budget)
                if start < stop:
                    prefill.append(Work(request, start, stop))
                    budget -= stop - start
                    start = stop
            if start >= end:  # from the last prompt token on: one row, and those of a replay
                stop = min(request.length, start + 1 + budget)
                decode.append(Work(request, start, stop))
                budget -= stop - start - 1
        return Step(prefill, decode)

    def reserve(self, request: Request, wanted: int) -> int:
        """How many tokens may be drafted for a request of the step that was planned last.

        As many as are wanted and as it may still get besides the next one, and as there are slots
        for without evicting anything. The next plan() has the pages back before it decides
        anything, so drafts never make anyone wait or compute again.
        """
        self._drafted.append(request)
        most = min(wanted, request.longest - request.length - 1)
        missing = self._pages_for(request.length + most) - len(request.pages)
        if (taken := min(missing, self.pages.num_free)) > 0:
            request.pages += self.pages.take(taken, request.pages[-1])
        return max(0, min(most, len(request.pages) * self.page_size - request.length))

    def advance(self, step: Step) -> None:
        """The step was run: its tokens are in the cache, and pages that filled up can be shared."""
        for request, start, stop in (*step.prefill, *step.decode):
            request.num_computed = min(stop, request.length)  # drafts may be wrong
            for i in range(start // self.page_size, min(stop // self.page_size, len(request.keys))):
                before = request.pages[i - 1] if i else None
                self.prefixes.remember(request.keys[i], request.pages[i], before)
                self._pending.pop(request.keys[i].digest, None)

    def forget_prefixes(self) -> None:
        """What is in the pages is worth nothing any more: the model has changed."""
        for page in self.prefixes.clear():
            if self.pages.is_idle(page):
                self.pages.free(page)
        self._pending.clear()
        for request in self.running:
            request.keys = ()  # a page it has begun would be of both models

    def view(self) -> View:
        """Who holds which pages."""
        return View(
            num_pages=len(self.pages.references),
            page_size=self.page_size,
            idle=self.pages.idle,
            held=[(request, [*request.pages]) for request in self.running],
            num_waiting=len(self.waiting),
        )

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _cut(self, stop: int) -> int:
        return stop // self._block * self._block

    def _drop_drafts(self) -> None:
        """Those of the last step, and the pages that were only for them."""
        for request in self._drafted:
            request.drafts = ()
            needed = self._pages_for(request.length)
            for page in reversed(request.pages[needed:]):
                self.pages.drop(page, remember=False)
            del request.pages[needed:]
        self._drafted.clear()

    def _make_room(self) -> bool:
        """A place for every running request's next token; False if some had to go for it."""
        before = len(self.running)
        for request in tuple(self.running):
            missing = self._pages_for(request.length) - len(request.pages)
            while missing > self.pages.num_available and request in self.running:
                self._preempt(self.running[-1])
            if missing > 0 and request in self.running:
                request.pages += self.pages.take(missing, request.pages[-1])
        return len(self.running) == before

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_back(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)

    def _give_back(self, request: Request) -> None:
        # The last page first: of idle pages it is then the first to go, and no page is left
        # remembered whose predecessor is not.
        for page in reversed(request.pages):
            self.pages.drop(page, remember=page in self.prefixes)
        request.pages.clear()
        request.drafts = ()
        self._on_release(request)
        for key in request.keys:
            if self._pending.get(key.digest) is request:
                del self._pending[key.digest]

    def _admit(self) -> None:
        """Start those at the head of the queue, as long as there is room."""
        while self.waiting and len(self.running) < self.max_running:
            request = next(iter(self.waiting))
            if not self._seat(request):
                return
            del self.waiting[request]
            self.running.append(request)

    def _seat(self, request: Request) -> bool:
        """Give it pages for all its known tokens; False if it had better wait."""
        known = self.prefixes.find(request.keys)
        unknown = request.keys[len(known) :]
        if unknown and unknown[0].digest in self._pending:
            return False  # another is about to compute what this one can share
        needed = self._pages_for(request.length) - len(known)
        revived = sum(map(self.pages.is_idle, known))
        in_hand = len(self.running)  # a page to grow for each that runs, or it would soon be back
        if needed + revived + in_hand > self.pages.num_available:
            return False
        self.pages.hold(known)
        room = self._pages_for(request.longest)
        request.pages = known + self.pages.take(needed, known[-1] if known else None, room)
        request.num_computed = len(known) * self.page_size
        if not request.num_preemptions:
            request.num_cached = request.num_computed
        self._pending.update((key.digest, request) for key in unknown)
        return True
