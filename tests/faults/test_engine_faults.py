"""Ten thousand requests with many faults: no fault affects other requests, and no page leaks."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from random import Random
from types import NoneType

import pytest

from llama32 import load_model
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.scheduler import Scheduler
from llama32.engine.settings import EngineSettings
from llama32.sampling_params import Sampling
from tests.engine.fakes import (
    ANSWERS,
    PAGE,
    FakeDrafts,
    answer,
    make_engine,
    make_prompt,
    run_to_the_end,
)

NUM_REQUESTS = 10_000


class OfACallbackError(Exception):
    pass


class OfTheModelError(Exception):
    pass


class Traffic:
    """Random requests, and the expected end of each.

    Prompts branch off from a few stems at any place, many in the middle of a page. Faults are
    decided when a request is added, except aborts, which come at any time.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.random = Random(seed)
        self.requests: list[Request] = []
        self.answers: dict[Request, list[int]] = {}  # the output of each request alone
        self.fates: dict[Request, type[Exception]] = {}
        self.broken: dict[Request, int] = {}  # the token whose row is not finite
        self.aborted: set[Request] = set()
        self._stems = [make_prompt(40, seed) for seed in range(12)]

    def add(self) -> None:
        r = self.random
        stem = r.choice(self._stems)
        prompt = stem[: r.randrange(1, 40)] + r.choices(range(ANSWERS), k=r.choice([0, 1, 5, 20]))
        new = r.choice([1, 1, 2, 5, 24])
        expected = answer(prompt, new)
        stop_ids = ()
        if r.random() < 0.2:
            stop_ids = expected[r.randrange(new) :][:1]
            expected = expected[: expected.index(stop_ids[0]) + 1]
        on_token, on_prefill = None, None
        fate = r.choices(["good", "on_token", "on_prefill", "row"], [90, 3, 2, 3])[0]
        if fate == "on_token":
            on_token = raising(r.randrange(len(expected)))
        if fate == "on_prefill":
            on_prefill = raising(0)
        request = self.engine.add(
            prompt,
            Sampling(max_new_tokens=new, stop_ids=stop_ids),
            on_token=on_token,
            on_prefill=on_prefill,
        )
        self.requests.append(request)
        self.answers[request] = expected
        if fate == "row":
            self.fates[request] = FloatingPointError
            self.broken[request] = r.randrange(len(expected))
        elif fate != "good":
            self.fates[request] = OfACallbackError

    def abort(self) -> None:
        """Abort any recent request, ended requests included."""
        request = self.random.choice(self.requests[-50:])
        if request.finish_reason is None:
            self.aborted.add(request)
        self.engine.abort(request)

    def is_finite(self, request: Request, num_output: int) -> bool:
        return self.broken.get(request) != num_output

    def check(self, request: Request) -> None:
        """Check that a request ended as expected."""
        expected, output = self.answers[request], request.output
        assert [token.id for token in request.tokens] == output == expected[: len(output)]
        assert request.pages == []
        if request in self.aborted:
            assert (request.finish_reason, request.error) == ("abort", None)
        elif request in self.fates:
            assert request.finish_reason == "error"
            assert type(request.error) is self.fates[request]
            assert len(output) == self.broken.get(request, len(output))
        else:
            assert request.finish_reason == request.tokens[-1].finish_reason
            is_stopped = output[-1] in request.sampling.stop_ids
            assert request.finish_reason == ("stop" if is_stopped else "length")
            assert output == expected


def raising(at: int) -> Callable[..., None]:
    """Return a callback that raises after `at` calls."""
    calls = count()

    def callback(*arguments: object) -> None:
        if next(calls) == at:
            raise OfACallbackError

    return callback


@pytest.mark.parametrize("quality", [None, 0.7], ids=["plain", "drafts"])
def test_ten_thousand_requests_over_a_small_cache_with_faults_of_all_kinds(monkeypatch, quality):
    monkeypatch.setattr("llama32.engine.engine.Scheduler", partial(Scheduler, alignment=4))
    drafts = None if quality is None else FakeDrafts(quality, num_tokens=5)
    engine, runner = make_engine(
        num_pages=20, page_size=8, max_running=12, prefill_tokens=32, speculation=drafts
    )
    pages = engine.scheduler.pages
    evicted: list[int] = []
    pages._on_evict = lambda page, evict=pages._on_evict: (evicted.append(page), evict(page))
    traffic = Traffic(engine, seed=1)
    runner.is_finite = traffic.is_finite
    r = traffic.random
    failed_steps = 0
    while len(traffic.requests) < NUM_REQUESTS or engine.is_busy:
        if len(engine.scheduler.waiting) < 30:
            for _ in range(r.choice([0, 0, 1, 4])):
                if len(traffic.requests) < NUM_REQUESTS:
                    traffic.add()
        if traffic.requests and r.random() < 0.05:
            traffic.abort()
        if r.random() < 0.002:
            engine.forget_prefixes()
        if r.random() < 0.02:
            runner.errors.append(OfTheModelError())
        try:
            engine.step()
        except OfTheModelError:
            failed_steps += 1
    for request in traffic.requests:
        traffic.check(request)
    assert len(traffic.requests) == NUM_REQUESTS
    assert pages.num_referenced == 0
    assert not any(pages.ref_counts)
    assert not engine.scheduler._pending
    assert engine.stats.generated == sum(len(request.output) for request in traffic.requests)
    if drafts is not None:
        assert not drafts.tracked
        assert 0.4 < engine.stats.acceptance_rate < 0.7
    kinds = Counter((request.finish_reason, type(request.error)) for request in traffic.requests)
    assert kinds["length", NoneType] > 5000
    assert kinds["stop", NoneType] > 500
    assert kinds["abort", NoneType] > 300
    assert kinds["error", OfACallbackError] > 300
    assert kinds["error", FloatingPointError] > 100
    assert failed_steps > 100
    assert engine.stats.preemptions > 40
    assert sum(request.num_cached > 0 for request in traffic.requests) > 1000
    assert len(evicted) > 1000


def test_of_a_real_model_those_that_are_not_aborted_get_what_they_get_alone():
    model = load_model("tiny")
    r = Random(3)
    stem = make_prompt(130)
    inputs = []
    for i in range(16):
        prompt = [*stem[: r.choice([40, 60, 62, 63, 70, 120, 130])], i]
        new = r.randrange(10, 40)
        sampling = Sampling(temperature=i % 2, seed=i, max_new_tokens=new, ignore_eos=True)
        inputs.append((prompt, sampling))
    alone = Engine.of(model, EngineSettings(deterministic=True, cache_tokens=64 * 3))
    expected = []
    for request_input in inputs:
        request = alone.add(*request_input)
        run_to_the_end(alone)
        alone.forget_prefixes()
        expected.append(request.output)

    engine = Engine.of(model, EngineSettings(deterministic=True, cache_tokens=64 * 6))
    requests: list[Request] = []
    aborted = set()
    while len(requests) < len(inputs) or engine.is_busy:
        requests += [
            engine.add(*request_input)
            for request_input in inputs[len(requests) :][: r.choice([0, 1, 3])]
        ]
        if requests and r.random() < 0.08:
            request = r.choice(requests)
            if request.finish_reason is None:
                aborted.add(request)
            engine.abort(request)
        engine.step()
    for request, output in zip(requests, expected, strict=True):
        if request in aborted:
            assert request.finish_reason == "abort"
            assert request.output == output[: len(request.output)]
        else:
            assert request.finish_reason == "length"
            assert request.output == output
    assert engine.stats.pages_held == 0
    assert engine.stats.preemptions > 0
    assert engine.stats.prompt_cached > 0
    assert 3 <= len(aborted) <= 10


def test_the_fewest_pages_that_hold_the_longest_request_are_enough_for_all():
    r = Random(2)
    inputs = [
        (make_prompt(r.randrange(1, 150), r.randrange(4)), r.randrange(1, 200)) for _ in range(60)
    ]
    longest = max(len(prompt) + new for prompt, new in inputs)
    fewest = -(-longest // PAGE)
    outputs = []
    for num_pages in (fewest, 1000):
        engine, _ = make_engine(num_pages)
        requests = [engine.add(prompt, Sampling(max_new_tokens=new)) for prompt, new in inputs]
        run_to_the_end(engine)
        outputs.append([request.output for request in requests])
        assert (engine.stats.preemptions > 0) == (num_pages == fewest)
    assert outputs[0] == outputs[1] == [answer(*request_input) for request_input in inputs]
    engine, _ = make_engine(fewest - 1)
    prompt, new = max(inputs, key=lambda request_input: len(request_input[0]) + request_input[1])
    with pytest.raises(ValueError, match=f"{longest} tokens"):
        engine.add(prompt, Sampling(max_new_tokens=new))
