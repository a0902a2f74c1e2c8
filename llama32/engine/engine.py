"""Many requests at once, each as if it were alone.

    engine = Engine.of(model)
    requests = [engine.add(prompt, Sampling(seed=i)) for i, prompt in enumerate(prompts)]
    while engine.is_busy:
        engine.step()
    print([request.output for request in requests])

Ids in, ids out: text, stop strings and chat are the caller's. Whoever steps moves all requests on,
and one lock is around it all, so threads may share an engine.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from random import Random, SystemRandom
from threading import RLock
from typing import Any, Protocol, runtime_checkable

from llama32.config import LlamaConfig
from llama32.engine.drawing import Drawn
from llama32.engine.request import Request
from llama32.engine.runner import Runner
from llama32.engine.scheduler import Scheduler, Step
from llama32.engine.settings import EngineSettings
from llama32.engine.speculation import Speculator, in_turns
from llama32.engine.stats import COUNTED, Stats, View
from llama32.generate import Token, check_prompt
from llama32.model import Llama
from llama32.settings import Sampling


@runtime_checkable
class Runs(Protocol):
    """What the engine needs of a runner; tests have one without a model."""

    num_pages: int
    page_size: int
    deterministic: bool

    @property
    def config(self) -> LlamaConfig: ...
    def run(self, step: Step) -> list[Drawn]: ...
    def warm_up(self, on_progress: Callable[[int, int], object]) -> None: ...
    def fingerprint(self) -> Hashable: ...
    def forget(self) -> None: ...


class Engine:
    """Continuous batching: requests come and go between steps, and share the pages of one cache.

    `deterministic` tells whether tokens and logprobs are bitwise the same in any company.
    """

    def __init__(self, runner: Runs, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        self.scheduler = Scheduler(
            runner.num_pages,
            runner.page_size,
            max_running=settings.max_running,
            prefill_tokens=settings.prefill_tokens,
            on_release=self._release,
        )
        self.deterministic = runner.deterministic
        self._runner: Runs | None = runner
        self._fingerprint = runner.fingerprint()
        self._lock = RLock()
        self._chance = SystemRandom() if settings.seed is None else Random(settings.seed)
        self._counts = Counter(dict.fromkeys(COUNTED, 0))
        self._speculator: Speculator | None = None
        if settings.speculation is not None:
            size, tokens = runner.page_size, runner.page_size * runner.num_pages
            found = replace(settings, page_size=size, cache_tokens=tokens, cache_bytes=None)
            drafter = settings.speculation.drafter(runner.config, found)
            self._speculator = Speculator(drafter, settings.speculation.num_tokens)

    @classmethod
    def of(cls, model: Llama, settings: EngineSettings | None = None) -> "Engine":
        """An engine with a cache of its own for this model, where and in the dtype it is."""
        settings = settings or EngineSettings()
        return cls(Runner(model, settings), settings)

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        eos_ids: Collection[int] = (),
        guide: Any = None,
        on_token: Callable[[Token], object] | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
    ) -> Request:
        """Queue a request. Steps move it: its `tokens` grow until it has a `finish_reason`.

        `on_token` is told every token as it comes, `on_prefill(done, total)` how far the prompt is
        read. What they raise ends this request with the reason "error", and touches no other.
        `guide` (`guides.py`) leads it through a grammar; it gets no drafts. ValueError at once for
        what could never run: no prompt, ids out of range, more than the context or the cache holds.
        """
        sampling = sampling or Sampling()
        with self._lock:
            config = self._open().config
            longest = check_prompt(config, prompt, sampling)
            if (token := max(sampling.logit_bias, default=0)) >= config.vocab_size:
                raise ValueError(f"logit_bias: token {token}, of {config.vocab_size} in all")
            ends = guide is not None or not sampling.ignore_eos  # a grammar says when it may end
            request = Request(
                prompt=list(prompt),
                longest=longest,
                sampling=sampling,
                seed=self._chance.getrandbits(64) if sampling.seed is None else sampling.seed,
                guide=guide,
                stop_ids=frozenset(sampling.stop_ids).union(eos_ids if ends else ()),
                on_token=on_token,
                on_prefill=on_prefill,
            )
            if not self.is_busy:
                self._notice_changes()
            self.scheduler.add(request)
        return request

    def warm_up(self, on_progress: Callable[[int, int], object] = lambda done, of: None) -> None:
        """Compile now what is to be compiled, and not with the first requests."""
        with self._lock:
            self._open().warm_up(on_progress)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to step for."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Request]:
        """Move all that run by one step; returns those that got a token, or several, or ended.

        What the model raises comes out here, and leaves every request as it was before.
        """
        with self._lock:
            runner = self._open()
            step = self.scheduler.plan()
            if self._speculator is not None:
                step = self._speculator.lengthen(step, self.scheduler)
            drawn = runner.run(step)
            self.scheduler.advance(step)
            self._counts["steps"] += 1
            self._learn(drawn)
            before = {one.request: one.request.length for one in drawn}
            for n, turn in enumerate(in_turns(drawn)):
                due = [one for one in turn if self._is_due(one.request, before[one.request] + n)]
                for one in due:
                    self._keep(one)
                # Only when all is in order may strangers' code run: it might stop, or abort
                # another.
                if n == 0:
                    self._report(step)
                for one in due:
                    if one.request.on_token and one.error is None:
                        self._call(one.request, one.request.on_token, one.request.tokens[-1])
            return list(before)

    def wait(self, request: Request, seen: int) -> None:
        """Step until it has more than `seen` tokens, or its end."""
        while len(request.tokens) <= seen and request.finish_reason is None:
            with self._lock:  # while this one waited for it, another may have done the step
                if len(request.tokens) <= seen and request.finish_reason is None:
                    self.step()

    def stream(self, request: Request) -> Iterator[Token]:
        """Its tokens as they come. Leaving early aborts it. Raises what ended it, if something."""
        seen = 0
        try:
            while request.finish_reason is None or seen < len(request.tokens):
                self.wait(request, seen)
                for token in request.tokens[seen:]:
                    seen += 1
                    yield token
        finally:
            self.abort(request)
        if request.error is not None:
            raise request.error

    def abort(self, request: Request) -> None:
        """End it, if it has not ended, and free its pages at once."""
        with self._lock:
            if request.finish_reason is None:
                self._end(request, "abort")

    def fail(self, error: Exception) -> None:
        """End all with this error: the model has raised it, and may go on to do so."""
        with self._lock:
            for request in (*self.scheduler.running, *self.scheduler.waiting):
                self._end(request, "error", error)

    def close(self) -> None:
        """Abort all, and let go of the model and of the cache."""
        with self._lock:
            for request in (*self.scheduler.running, *self.scheduler.waiting):
                self._end(request, "abort")
            self.scheduler.forget_prefixes()
            self._runner = self._speculator = None

    @property
    def is_closed(self) -> bool:
        """Whether it has let go of all, and can do no more."""
        return self._runner is None

    def forget_prefixes(self) -> None:
        """Compute every prompt anew: for when the model changed in a way that cannot be seen."""
        with self._lock:
            self.scheduler.forget_prefixes()

    @property
    def stats(self) -> Stats:
        """As it is now."""
        with self._lock:
            pages = self.scheduler.pages
            return Stats(
                **self._counts,
                preemptions=self.scheduler.num_preemptions,
                running=len(self.scheduler.running),
                waiting=len(self.scheduler.waiting),
                pages_held=pages.num_held,
                pages_idle=pages.num_available - pages.num_free,
                pages=len(pages.references),
            )

    def view(self) -> View:
        """The pages of the cache, as they are now."""
        with self._lock:
            return self.scheduler.view()

    def _open(self) -> Runs:
        if self._runner is None:
            raise RuntimeError("the engine is closed")
        return self._runner

    def _notice_changes(self) -> None:
        """What an earlier model left in the cache is no prefix of this one's."""
        runner = self._open()
        fingerprint = runner.fingerprint()
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self.scheduler.forget_prefixes()
            runner.forget()

    def _learn(self, drawn: Sequence[Drawn]) -> None:
        """Which drafts were right."""
        if self._speculator is not None:
            tokens = Counter(one.request for one in drawn)
            self._speculator.learn({request: count - 1 for request, count in tokens.items()})
            self._counts["drafted"] += sum(len(request.drafts) for request in tokens)
            self._counts["accepted"] += len(drawn) - len(tokens)

    def _is_due(self, request: Request, length: int) -> bool:
        """Whether it is still there for a token behind so many: an earlier one of the same step may
        have ended it, or what was told of that one may have moved it on."""
        return request.finish_reason is None and request.length == length

    def _report(self, step: Step) -> None:
        """How far prompts are read."""
        reached = {work.request: work.stop for work in (*step.prefill, *step.decode)}
        for request, stop in reached.items():
            if request.on_prefill and len(request.output) <= 1:
                total = len(request.prompt)
                self._call(request, request.on_prefill, min(stop, total), total)

    def _keep(self, drawn: Drawn) -> None:
        """One token more, or the end."""
        request, id, logprobs, error = drawn
        if error is not None:
            self._end(request, "error", error)
            return
        try:
            reason = request.append(id)
        except ValueError as error:  # its grammar has become too large
            self._end(request, "error", error)
            return
        request.tokens.append(Token(id, logprobs, reason))
        self._counts["generated"] += 1
        if len(request.output) == 1:
            self._counts["prompt_cached"] += request.num_cached
            self._counts["prompt_computed"] += len(request.prompt) - request.num_cached
        if reason is not None:
            self._end(request, reason)

    def _release(self, request: Request) -> None:
        """It has no pages any more."""
        if self._speculator is not None:
            self._speculator.release(request)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        self.scheduler.finish(request, distrust=isinstance(error, FloatingPointError))
        request.finish_reason, request.error = reason, error

    def _call(self, request: Request, callback: Callable[..., object], *told: object) -> None:
        """A user's code: its faults are for the request that brought it."""
        try:
            callback(*told)
        except Exception as error:
            if request.error is None:
                self._end(request, "error", error)
