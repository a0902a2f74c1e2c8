"""The engine: many requests at once over one model and one KV cache.

    engine = Engine.of(model)
    requests = [engine.add(prompt, Sampling(seed=i)) for i, prompt in enumerate(prompts)]
    while engine.is_busy:
        engine.step()
    print([request.output for request in requests])

The engine works on token ids; the caller handles text, stop strings and chat. Each step advances
all running requests. A lock guards the methods, so threads may share an engine.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from random import Random, SystemRandom
from threading import RLock
from typing import Any, Protocol, runtime_checkable

from llama32.config import LlamaConfig
from llama32.engine.delivery import TokenDelivery
from llama32.engine.request import Request
from llama32.engine.runner import Runner
from llama32.engine.scheduler import ScheduledStep, Scheduler
from llama32.engine.settings import EngineSettings
from llama32.engine.speculation import Speculator
from llama32.engine.stats import COUNTERS, CacheSnapshot, Stats
from llama32.engine.token_sampling import SampledToken
from llama32.generate import Token, check_prompt
from llama32.model import Llama
from llama32.sampling_params import Sampling


@runtime_checkable
class StepRunner(Protocol):
    """The runner interface that an engine needs. Tests use a fake without a model."""

    num_pages: int
    page_size: int
    deterministic: bool

    @property
    def config(self) -> LlamaConfig: ...
    def run(self, step: ScheduledStep) -> list[SampledToken]: ...
    def warm_up(self, on_progress: Callable[[int, int], object]) -> None: ...
    def fingerprint(self) -> Hashable: ...
    def reset_compiled(self) -> None: ...


class Engine:
    """Continuous batching: requests join and leave between steps, and share one cache.

    `deterministic` is True if the engine is batch-invariant: the bits of a request's tokens and
    log-probabilities do not depend on the batch.
    """

    def __init__(self, runner: StepRunner, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        self.scheduler = Scheduler(
            runner.num_pages,
            runner.page_size,
            max_running=settings.max_running,
            prefill_tokens=settings.prefill_tokens,
            on_release=self._release,
        )
        self.deterministic = runner.deterministic
        self._runner: StepRunner | None = runner
        self._fingerprint = runner.fingerprint()
        self._lock = RLock()
        self._seed_source = SystemRandom() if settings.seed is None else Random(settings.seed)
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._delivery = TokenDelivery(self._end, self._counts)
        self._speculator: Speculator | None = None
        if settings.speculation is not None:
            size, tokens = runner.page_size, runner.page_size * runner.num_pages
            actual = replace(settings, page_size=size, cache_tokens=tokens, cache_bytes=None)
            drafter = settings.speculation.drafter(runner.config, actual)
            self._speculator = Speculator(drafter, settings.speculation.num_tokens)

    @classmethod
    def of(cls, model: Llama, settings: EngineSettings | None = None) -> "Engine":
        """Create an engine and a cache for a model, on the model's device and in its dtype."""
        settings = settings or EngineSettings()
        return cls(Runner(model, settings), settings)

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        eos_ids: Collection[int] = (),
        matcher: Any = None,
        on_token: Callable[[Token], object] | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
    ) -> Request:
        """Queue a request. Steps extend `request.tokens` until `request.finish_reason` is set.

        `on_token` receives every token, `on_prefill(done, total)` the progress of the prompt. An
        exception in a callback ends the request with the reason "error"; other requests continue.
        `matcher` (`text/grammar.py`) restricts the output to a grammar, and disables drafts. Raises
        ValueError if the request can never run: an empty prompt, unknown token ids, or a length
        beyond the context or the cache.
        """
        sampling = sampling or Sampling()
        with self._lock:
            config = self._require_runner().config
            max_length = check_prompt(config, prompt, sampling)
            if (token := max(sampling.logit_bias, default=0)) >= config.vocab_size:
                raise ValueError(
                    f"logit_bias: token id {token} is outside the vocabulary of {config.vocab_size}"
                )
            # A grammar decides where the output may end, so `ignore_eos` does not apply.
            has_eos = matcher is not None or not sampling.ignore_eos
            request = Request(
                prompt=list(prompt),
                max_length=max_length,
                sampling=sampling,
                seed=self._seed_source.getrandbits(64) if sampling.seed is None else sampling.seed,
                matcher=matcher,
                stop_ids=frozenset(sampling.stop_ids).union(eos_ids if has_eos else ()),
                on_token=on_token,
                on_prefill=on_prefill,
            )
            if not self.is_busy:
                self._detect_model_changes()
            self.scheduler.add(request)
        return request

    def warm_up(self, on_progress: Callable[[int, int], object] = lambda done, total: None) -> None:
        """Compile the model now rather than during the first requests."""
        with self._lock:
            self._require_runner().warm_up(on_progress)

    @property
    def is_busy(self) -> bool:
        """True if a request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Request]:
        """Run one step; return the requests that got one or more tokens, or ended.

        If the model raises, the exception propagates and all requests stay as before the step.
        """
        with self._lock:
            runner = self._require_runner()
            step = self.scheduler.schedule()
            if self._speculator is not None:
                step = self._speculator.add_drafts(step, self.scheduler)
            tokens = runner.run(step)
            self.scheduler.advance(step)
            self._counts["steps"] += 1
            self._record_acceptance(tokens)
            return self._delivery.deliver(step, tokens)

    def wait(self, request: Request, seen: int) -> None:
        """Run steps until the request has more than `seen` tokens or has ended."""
        while len(request.tokens) <= seen and request.finish_reason is None:
            # A different thread may run the step while this thread waits for the lock.
            with self._lock:
                if len(request.tokens) <= seen and request.finish_reason is None:
                    self.step()

    def stream(self, request: Request) -> Iterator[Token]:
        """Yield the tokens of a request as they are generated.

        Leaving early aborts the request. Raises the error that ended the request, if any.
        """
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
        """End a request that has not ended yet, and release the pages at once."""
        with self._lock:
            if request.finish_reason is None:
                self._end(request, "abort")

    def fail(self, error: Exception) -> None:
        """End all requests with an error, for example after the model has raised."""
        with self._lock:
            for request in (*self.scheduler.running, *self.scheduler.waiting):
                self._end(request, "error", error)

    def close(self) -> None:
        """Abort all requests, and release the model and the cache."""
        with self._lock:
            for request in (*self.scheduler.running, *self.scheduler.waiting):
                self._end(request, "abort")
            self.scheduler.clear_prefix_cache()
            self._runner = self._speculator = None

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._runner is None

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, after a change of the model that the engine cannot detect."""
        with self._lock:
            self.scheduler.clear_prefix_cache()

    @property
    def stats(self) -> Stats:
        """Totals so far, and the present state."""
        with self._lock:
            pages = self.scheduler.pages
            return Stats(
                **self._counts,
                preemptions=self.scheduler.num_preemptions,
                running=len(self.scheduler.running),
                waiting=len(self.scheduler.waiting),
                pages_held=pages.num_referenced,
                pages_evictable=pages.num_available - pages.num_free,
                pages=len(pages.ref_counts),
            )

    def snapshot(self) -> CacheSnapshot:
        """Return the present pages of the cache and of all running requests."""
        with self._lock:
            return self.scheduler.snapshot()

    def _require_runner(self) -> StepRunner:
        if self._runner is None:
            raise RuntimeError("the engine is closed")
        return self._runner

    def _detect_model_changes(self) -> None:
        """Discard cached prefixes and compiled code if the model has changed."""
        runner = self._require_runner()
        fingerprint = runner.fingerprint()
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self.scheduler.clear_prefix_cache()
            runner.reset_compiled()

    def _record_acceptance(self, tokens: Sequence[SampledToken]) -> None:
        """Count accepted drafts, and adapt the number of drafts."""
        if self._speculator is not None:
            counts = Counter(sampled.request for sampled in tokens)
            self._speculator.update({request: count - 1 for request, count in counts.items()})
            self._counts["drafted"] += sum(len(request.drafts) for request in counts)
            self._counts["accepted"] += len(tokens) - len(counts)

    def _release(self, request: Request) -> None:
        """Discard the drafter's state for a request whose pages were released."""
        if self._speculator is not None:
            self._speculator.release(request)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        self.scheduler.finish(request, invalidate=isinstance(error, FloatingPointError))
        request.finish_reason, request.error = reason, error
