"""Batch invariance: tokens and log-probabilities of a request have the same bits as alone, in every
batch, after preemption, with prefix hits and with drafts."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch

from llama32 import load, load_model
from llama32.cache.flash_attention import flash
from llama32.engine.batch_invariance import CallPlanner
from llama32.engine.draft_model import DraftModel
from llama32.engine.engine import Engine
from llama32.engine.prompt_lookup import PromptLookup
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings, Speculation
from llama32.generate import generate
from llama32.model import Llama
from llama32.sampling_params import Sampling
from tests.checkpoints import first_layers
from tests.fake_kernels import slow_kernel

NUM_REQUESTS = 64


class RequestInput(NamedTuple):
    prompt: list[int]
    sampling: Sampling


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request) -> Llama:
    return load_model("tiny", dtype=request.param)


@pytest.fixture(scope="module")
def inputs() -> list[RequestInput]:
    """Requests of many lengths and kinds: greedy and sampled, at the borders of tiles and pages,
    some with a common page, and a prompt that repeats itself."""
    r = random.Random(5)
    common = [r.randrange(2000) for _ in range(130)]
    again = load("tiny").encode("They climbed the tree. " * 20)
    lengths = [1, 2, 63, 64, 65, 66, 128, 129, 130, 200]
    requests = []
    for i in range(NUM_REQUESTS):
        n = lengths[i] if i < len(lengths) else r.randrange(1, 150)
        own = again[:n] if i == 3 else [r.randrange(2000) for _ in range(n)]
        sampling = Sampling(
            temperature=0 if i % 3 == 0 else 0.9,
            top_p=0.95 if i % 3 == 2 else None,
            repetition_penalty=1.1 if i % 5 == 4 else 1.0,
            seed=i,
            max_new_tokens=r.randrange(2, 24),
            logprobs=2,
            ignore_eos=True,
        )
        requests.append(RequestInput(common + own if i % 4 == 1 else own, sampling))
    return requests


def make_engine(model: Llama, **settings) -> Engine:
    given = {"deterministic": True, "cache_tokens": 64 * 256, **settings}
    return Engine.of(model, EngineSettings(**given))


def run(
    engine: Engine, inputs: Sequence[RequestInput], each_step: Callable = lambda: None
) -> list[list]:
    """Return the ids and log-probabilities of each request, bit for bit."""
    requests = [engine.add(*request_input) for request_input in inputs]
    while engine.is_busy:
        engine.step()
        each_step()
    return [outcome(request) for request in requests]


def outcome(request: Request) -> list:
    assert request.finish_reason == "length"
    return [(token.id, token.logprobs.chosen, token.logprobs.top) for token in request.tokens]


ALONE: dict[torch.dtype, list[list]] = {}  # computed once, in any order of the tests


@pytest.fixture
def alone(model, inputs) -> list[list]:
    """Outcomes of each request alone, with an empty cache."""
    dtype = model.norm.weight.dtype
    if dtype not in ALONE:
        engine = make_engine(model)
        outcomes: list[list] = []
        for request_input in inputs:
            outcomes += run(engine, [request_input])
            engine.forget_prefixes()
        ALONE[dtype] = outcomes
    return ALONE[dtype]


@pytest.mark.parametrize("neighbours", [1, 7, 63])
def test_alone_is_among_neighbours(model, inputs, alone, neighbours):
    engine = make_engine(model)
    for first in range(0, NUM_REQUESTS, neighbours + 1):
        together = slice(first, first + neighbours + 1)
        assert run(engine, inputs[together]) == alone[together]
        engine.forget_prefixes()


@pytest.mark.parametrize("seed", range(3))
def test_alone_is_in_any_order_of_arrival(model, inputs, alone, seed):
    engine = make_engine(model, max_running=20)
    r = random.Random(seed)
    order = r.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    requests: dict[int, Request] = {}
    while len(requests) < NUM_REQUESTS or engine.is_busy:
        for i in order[len(requests) :][: r.choice([0, 0, 1, 5])]:
            requests[i] = engine.add(*inputs[i])
        engine.step()
    assert [outcome(requests[i]) for i in range(NUM_REQUESTS)] == alone


def test_a_prefix_hit_is_a_miss(model, inputs, alone):
    engine = make_engine(model)
    for hits in (False, True):
        requests = [engine.add(*request_input) for request_input in inputs]
        while engine.is_busy:
            engine.step()
        assert [outcome(request) for request in requests] == alone
        expected = [
            (len(request_input.prompt) - 1) // 64 * 64 if hits else 0 for request_input in inputs
        ]
        cached = [request.num_cached for request in requests]
        assert cached == expected if hits else max(cached) == 128  # the common beginning


@pytest.mark.parametrize("seed", range(2))
def test_preempted_is_not_preempted(model, inputs, alone, seed):
    engine = make_engine(model)
    r = random.Random(seed)

    def preempt() -> None:
        scheduler = engine.scheduler
        for _ in range(r.choice([0, 0, 1, 3])):
            if len(scheduler.running) > 1:
                scheduler._preempt(scheduler.running[-1])

    assert run(engine, inputs, preempt) == alone
    assert engine.stats.preemptions > 20


def test_a_cache_of_a_few_pages_is_a_large_one(model):
    r = random.Random(8)
    prompts = [[r.randrange(2000) for _ in range(r.randrange(1, 100))] for _ in range(10)]
    growing = Sampling(temperature=0.9, seed=3, max_new_tokens=200, logprobs=1, ignore_eos=True)
    inputs = [RequestInput(prompt, growing) for prompt in prompts]
    large, small = make_engine(model), make_engine(model, cache_tokens=64 * 8)
    assert run(small, inputs) == run(large, inputs)
    assert large.stats.preemptions == 0
    assert small.stats.preemptions >= 5
    assert small.stats.pages_held == 0


@pytest.mark.parametrize("prefill_tokens", [64, 512])
def test_the_budget_of_a_step_is_irrelevant(model, inputs, alone, prefill_tokens):
    assert run(make_engine(model, prefill_tokens=prefill_tokens), inputs) == alone


def test_the_law_holds_on_a_gpu_s_way_through_the_pages(model):
    """With a CPU kernel that has the guarantees of the GPU kernel."""
    r = random.Random(9)
    drawn = Sampling(temperature=0.9, seed=4, max_new_tokens=8, logprobs=1, ignore_eos=True)
    lengths = [1, 60, 65, 130, 200, 300]
    inputs = [RequestInput([r.randrange(2000) for _ in range(n)], drawn) for n in lengths]

    def make() -> Engine:
        engine = make_engine(model)
        engine._runner.cache.attend = partial(flash, kernel=slow_kernel)
        return engine

    alone = [outcome for request_input in inputs for outcome in run(make(), [request_input])]
    assert run(make(), inputs) == alone


def test_the_law_holds_with_several_threads(model, inputs):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = [
            outcome
            for request_input in inputs[:8]
            for outcome in run(make_engine(model), [request_input])
        ]
        assert run(make_engine(model), inputs[:8]) == alone
    finally:
        torch.set_num_threads(threads)


def test_where_no_other_count_agrees_rows_are_split_up(model, inputs, alone):
    engine = make_engine(model)
    runner = engine._runner
    for name in ("prefill_planner", "decode_planner"):
        rows = getattr(runner, name)
        only = lambda n, canonical=rows.canonical: n == canonical  # noqa: E731
        setattr(runner, name, CallPlanner(rows.candidates, rows.canonical, only))
    assert run(engine, inputs) == alone


@pytest.fixture(scope="module", params=["lookup", "draft model"])
def speculation(request, model) -> Speculation:
    """Drafts that are sometimes accepted and sometimes rejected."""
    if request.param == "lookup":
        return PromptLookup(min_ngram=1, num_tokens=5)
    return DraftModel(first_layers(model, 4), num_tokens=3)


def check_drafted(engine: Engine) -> None:
    stats = engine.stats
    assert 0 < stats.accepted < stats.drafted
    assert stats.pages_held == 0


@pytest.mark.parametrize(("neighbours", "up_to"), [(0, 32), (7, NUM_REQUESTS), (63, NUM_REQUESTS)])
def test_drafted_is_not_drafted(model, inputs, alone, speculation, neighbours, up_to):
    engine = make_engine(model, speculation=speculation)
    for first in range(0, up_to, neighbours + 1):
        together = slice(first, first + neighbours + 1)
        assert run(engine, inputs[together]) == alone[together]
    check_drafted(engine)


def test_drafted_and_preempted_is_neither(model, inputs, alone, speculation):
    engine = make_engine(model, speculation=speculation, prefill_tokens=64)
    r = random.Random(0)

    def preempt() -> None:
        for _ in range(r.choice([0, 0, 1, 3])):
            if len(engine.scheduler.running) > 1:
                engine.scheduler._preempt(engine.scheduler.running[-1])

    assert run(engine, inputs, preempt) == alone
    assert engine.stats.preemptions > 20
    check_drafted(engine)


def test_the_engine_is_the_plain_loop(inputs):
    """In the loop the last prompt token is computed with the prompt, so this is not bitwise."""
    model = load_model("tiny", dtype=torch.float32)
    engine = make_engine(model, deterministic=False)
    for tokens, (prompt, sampling) in zip(run(engine, inputs), inputs, strict=True):
        loop = list(generate(model, prompt, sampling))
        assert [id for id, _, _ in tokens] == [token.id for token in loop]
        for (_, logprob, _), token in zip(tokens, loop, strict=True):
            assert abs(logprob - token.logprobs.chosen) < 1e-4
