"""The scheduler as a state machine: operations in any order, few pages, similar prompts and drafts
of any quality.

The model is a function of all tokens so far, and writes exactly these tokens to a slot of a page.
A row that reads a slot can therefore check the owner.
"""

from collections import Counter
from itertools import count
from random import Random
from zlib import crc32

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llama32.engine.prefix_cache import PageKey
from llama32.engine.request import Request
from llama32.engine.scheduler import ScheduledStep, Scheduler

PAGE = 4
TOKENS = st.lists(st.integers(0, 1), max_size=9).map(tuple)
BEGINNINGS = st.sampled_from([(), (0,) * 8, (0,) * 14, (0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1)])


def next_token(tokens: tuple[int, ...]) -> int:
    return crc32(bytes(tokens)) % 3


def alone(request: Request) -> list[int]:
    """Return the output without a scheduler, up to the request's length."""
    tokens = tuple(request.prompt)
    for _ in request.output:
        tokens += (next_token(tokens),)
    return [*tokens[len(request.prompt) :]]


class SchedulerMachine(RuleBasedStateMachine):
    num_digests: int | None = None  # few enough for collisions

    @initialize(
        num_pages=st.integers(6, 20),
        alignment=st.sampled_from([2, 4]),
        more=st.integers(0, 16),
        max_running=st.integers(1, 6),
        num_drafts=st.sampled_from([0, 1, 3, 9]),
        quality=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    )
    def start(
        self,
        num_pages: int,
        alignment: int,
        more: int,
        max_running: int,
        num_drafts: int,
        quality: float,
    ) -> None:
        self.released: Counter[Request] = Counter()
        self.scheduler = Scheduler(
            num_pages,
            PAGE,
            max_running=max_running,
            prefill_tokens=alignment + more,
            alignment=alignment,
            on_release=lambda request: self.released.update([request]),
        )
        self.num_drafts = num_drafts
        self.quality = quality  # the probability that a draft is right
        self.random = Random(0)
        self.alignment = alignment
        self.arrivals = count()
        self.arrival: dict[Request, int] = {}
        self.model = 0  # version: a change clears the prefix cache
        self.written: dict[tuple[int, int], tuple[int, tuple[int, ...]] | None] = {}

    @property
    def alive(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.pages[position // PAGE], position % PAGE

    @rule(beginning=BEGINNINGS, end=TOKENS, new=st.integers(1, 24))
    def add(self, beginning: tuple[int, ...], end: tuple[int, ...], new: int) -> None:
        prompt = [*beginning, *end] or [2]
        request = Request(prompt=prompt, max_length=len(prompt) + new)
        if request.max_length > PAGE * len(self.scheduler.pages.ref_counts):
            with pytest.raises(ValueError, match=f"{request.max_length} tokens"):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        self.arrival[request] = next(self.arrivals)
        if self.num_digests:
            request.keys = [
                PageKey(key.digest % self.num_digests, key.tokens) for key in request.keys
            ]

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.run(self.plan())

    @precondition(lambda self: self.alive)
    @rule(half=st.booleans())
    def fail(self, half: bool) -> None:
        """A step fails; parts may have been written, and not even correctly."""
        step = self.with_drafts(self.plan())
        for chunk in (*step.prefill, *step.decode)[half:]:
            for position in range(chunk.start, chunk.stop):
                self.written[self.slot(chunk.request, position)] = None

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.alive))
        self.scheduler.finish(request)
        assert request.pages == []
        assert request not in self.alive

    @rule()
    def change_the_model(self) -> None:
        self.scheduler.clear_prefix_cache()
        self.model += 1

    def plan(self) -> ScheduledStep:
        old = set(self.scheduler.running)
        step = self.scheduler.schedule()
        assert self.scheduler.schedule() == step
        for request in self.scheduler.running:
            if request not in old:
                self.check_start(request)
        assert self.scheduler.running or not self.scheduler.waiting
        self.check_budget(step)
        return step

    def check_start(self, request: Request) -> None:
        """Check that the cached pages have the request's prompt, by the present model."""
        for position in range(request.num_computed):
            expected = self.model, tuple(request.prompt[: position + 1])
            assert self.written[self.slot(request, position)] == expected

    def check_budget(self, step: ScheduledStep) -> None:
        rows = sum(chunk.stop - chunk.start - 1 for chunk in step.decode)
        prompts = sum(chunk.stop - chunk.start for chunk in step.prefill)
        assert rows + prompts <= self.scheduler.prefill_tokens
        reached = {request: request.num_computed for request in self.scheduler.running}
        for request, start, stop in step.prefill:
            assert start == reached[request] < stop <= request.num_prefill_tokens
            assert stop % self.alignment == 0 or stop == request.num_prefill_tokens
            reached[request] = stop
        read = [r for r in self.scheduler.running if reached[r] >= r.num_prefill_tokens]
        assert [chunk.request for chunk in step.decode] == read
        for request, start, stop in step.decode:
            assert start == reached[request] < stop <= request.length

    def with_drafts(self, step: ScheduledStep) -> ScheduledStep:
        """Return the step with as many drafts as fit."""
        before = self.scheduler.num_preemptions, len(self.scheduler.waiting)
        num_evictable = self.scheduler.pages.num_available - self.scheduler.pages.num_free
        for request, _, stop in step.decode:
            if stop == request.length:
                room = self.scheduler.reserve_drafts(request, self.num_drafts)
                assert 0 <= room <= self.num_drafts
                assert request.length + room < request.max_length
                request.drafts = self.guess(request, room)
        pages = self.scheduler.pages
        assert (self.scheduler.num_preemptions, len(self.scheduler.waiting)) == before
        assert pages.num_available - pages.num_free == num_evictable
        decode = [
            chunk._replace(stop=chunk.stop + len(chunk.request.drafts)) for chunk in step.decode
        ]
        return step._replace(decode=decode)

    def guess(self, request: Request, count: int) -> list[int]:
        tokens = (*request.prompt, *request.output)
        for _ in range(count):
            is_wrong = self.random.random() >= self.quality
            tokens += ((next_token(tokens) + is_wrong) % 3,)
        return [*tokens[request.length :]]

    def run(self, step: ScheduledStep) -> None:
        step = self.with_drafts(step)
        chunks = (*step.prefill, *step.decode)
        for request, start, stop in chunks:
            tokens = (*request.prompt, *request.output, *request.drafts)
            for position in range(start, stop):
                slot = self.slot(request, position)
                assert self.scheduler.pages.ref_counts[slot[0]] == 1
                assert slot[0] not in self.scheduler.prefix_cache
                self.written[slot] = self.model, tokens[: position + 1]
        for request, _, stop in chunks:
            tokens = (*request.prompt, *request.output, *request.drafts)
            for position in range(stop):
                slot = self.written[self.slot(request, position)]
                assert slot is not None
                assert slot[1] == tokens[: position + 1]
        self.scheduler.advance(step)
        for request, _, stop in step.decode:
            if stop >= request.length:
                self.accept(request)
                if request.length == request.max_length:
                    self.scheduler.finish(request)
                    assert request.output == alone(request)

    def accept(self, request: Request) -> None:
        """Append the next tokens, up to the first that differs from its draft."""
        for draft in (*request.drafts, None):
            token = next_token((*request.prompt, *request.output))
            request.append(token)
            if token != draft:
                break
        assert request.num_computed == request.length - 1

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        pages = self.scheduler.pages
        references = Counter(page for request in self.alive for page in request.pages)
        assert pages.ref_counts == [references[page] for page in range(len(pages.ref_counts))]
        evictable = {page for page in range(len(pages.ref_counts)) if pages.is_evictable(page)}
        assert not evictable & references.keys()
        assert pages.num_referenced == len(references)
        assert pages.num_available == pages.num_free + len(evictable)
        assert pages.num_free + len(evictable) + len(references) == len(pages.ref_counts)
        for request in self.alive:
            assert len(set(request.pages)) == len(request.pages)

    @invariant()
    def cached_pages_exist_and_can_be_found(self) -> None:
        pages, prefixes = self.scheduler.pages, self.scheduler.prefix_cache
        by_page = prefixes._by_page
        assert {entry.page for entry in prefixes._by_digest.values()} == by_page.keys()
        for page, entry in by_page.items():
            assert pages.ref_counts[page] or pages.is_evictable(page)
            tokens: tuple[int, ...] = ()
            ancestor = entry
            while ancestor:
                assert by_page.get(ancestor.page) is ancestor
                tokens = ancestor.key.tokens + tokens
                ancestor = ancestor.parent
            for i in range(PAGE):
                expected = self.model, tokens[: len(tokens) - PAGE + i + 1]
                assert self.written[page, i] == expected
        for page in range(len(pages.ref_counts)):
            assert page in by_page or not pages.is_evictable(page)

    @invariant()
    def the_queue_is_in_order(self) -> None:
        scheduler = self.scheduler
        order = [self.arrival[request] for request in self.alive]
        assert order == sorted(order)
        assert all(self.released[request] == request.num_preemptions for request in self.alive)
        assert len(scheduler.running) <= scheduler.max_running
        assert all(not request.pages for request in scheduler.waiting)
        for digest, request in scheduler._pending.items():
            assert request in scheduler.running
            ahead = request.keys[request.num_computed // PAGE :]
            assert digest in {key.digest for key in ahead}

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # The oldest request gets a token in every step and is never preempted.
        limit = sum(request.max_length for request in self.alive)
        for _ in range(limit):
            if self.alive:
                self.run(self.plan())
                self.check_invariants_of_all()
        assert not self.alive
        assert self.scheduler.pages.num_referenced == 0
        assert not self.scheduler._pending

    def check_invariants_of_all(self) -> None:
        self.every_page_is_accounted_for()
        self.cached_pages_exist_and_can_be_found()
        self.the_queue_is_in_order()


class CollidingMachine(SchedulerMachine):
    num_digests = 5


@pytest.mark.parametrize("machine", [SchedulerMachine, CollidingMachine])
def test_whatever_happens_every_request_gets_its_own_answer_and_all_end(machine):
    options = settings(
        max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None
    )
    run_state_machine_as_test(machine, settings=options)
