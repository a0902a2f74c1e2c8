"""The same answer in any company: tokens and logprobs of a request are bitwise those that it gets
alone, whatever else the engine does meanwhile, and whatever is drafted."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch

from llama32 import load, load_model
from llama32.engine.draft import DraftModel
from llama32.engine.engine import Engine
from llama32.engine.lookup import PromptLookup
from llama32.engine.request import Request
from llama32.engine.rows import Rows
from llama32.engine.settings import EngineSettings, Speculation
from llama32.flash import flash
from llama32.generate import generate
from llama32.model import Llama
from llama32.settings import Sampling
from tests.checkpoints import first_layers
from tests.kernels import slow_kernel

NUM_REQUESTS = 64


class Asked(NamedTuple):
    prompt: list[int]
    sampling: Sampling


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request) -> Llama:
    return load_model("tiny", dtype=request.param)


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Requests of all lengths and kinds: greedy and drawn, around the borders of blocks and pages,
    some with a page in common with others, and one that says the same again and again."""
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
        requests.append(Asked(common + own if i % 4 == 1 else own, sampling))
    return requests


def make_engine(model: Llama, **settings) -> Engine:
    given = {"deterministic": True, "cache_tokens": 64 * 256, **settings}
    return Engine.of(model, EngineSettings(**given))


def run(engine: Engine, asked: Sequence[Asked], each_step: Callable = lambda: None) -> list[list]:
    """What each request got, bit for bit: ids and logprobs."""
    requests = [engine.add(*one) for one in asked]
    while engine.is_busy:
        engine.step()
        each_step()
    return [outcome(request) for request in requests]


def outcome(request: Request) -> list:
    assert request.finish_reason == "length"
    return [(token.id, token.logprobs.chosen, token.logprobs.top) for token in request.tokens]


ALONE: dict[torch.dtype, list[list]] = {}  # computed once, however the tests are ordered


@pytest.fixture
def alone(model, asked) -> list[list]:
    """Each in an engine that does nothing else, with nothing in its cache."""
    dtype = model.norm.weight.dtype
    if dtype not in ALONE:
        engine = make_engine(model)
        outcomes: list[list] = []
        for one in asked:
            outcomes += run(engine, [one])
            engine.forget_prefixes()
        ALONE[dtype] = outcomes
    return ALONE[dtype]


@pytest.mark.parametrize("neighbours", [1, 7, 63])
def test_alone_is_among_neighbours(model, asked, alone, neighbours):
    engine = make_engine(model)
    for first in range(0, NUM_REQUESTS, neighbours + 1):
        together = slice(first, first + neighbours + 1)
        assert run(engine, asked[together]) == alone[together]
        engine.forget_prefixes()


@pytest.mark.parametrize("seed", range(3))
def test_alone_is_in_any_order_of_arrival(model, asked, alone, seed):
    engine = make_engine(model, max_running=20)
    r = random.Random(seed)
    order = r.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    requests: dict[int, Request] = {}
    while len(requests) < NUM_REQUESTS or engine.is_busy:
        for i in order[len(requests) :][: r.choice([0, 0, 1, 5])]:
            requests[i] = engine.add(*asked[i])
        engine.step()
    assert [outcome(requests[i]) for i in range(NUM_REQUESTS)] == alone


def test_a_prefix_hit_is_a_miss(model, asked, alone):
    engine = make_engine(model)
    for hits in (False, True):
        requests = [engine.add(*one) for one in asked]
        while engine.is_busy:
            engine.step()
        assert [outcome(request) for request in requests] == alone
        expected = [(len(one.prompt) - 1) // 64 * 64 if hits else 0 for one in asked]
        cached = [request.num_cached for request in requests]
        assert cached == expected if hits else max(cached) == 128  # what they have in common


@pytest.mark.parametrize("seed", range(2))
def test_preempted_is_not_preempted(model, asked, alone, seed):
    engine = make_engine(model)
    r = random.Random(seed)

    def send_back() -> None:
        scheduler = engine.scheduler
        for _ in range(r.choice([0, 0, 1, 3])):
            if len(scheduler.running) > 1:
                scheduler._preempt(scheduler.running[-1])

    assert run(engine, asked, send_back) == alone
    assert engine.stats.preemptions > 20


def test_a_cache_of_a_few_pages_is_a_large_one(model):
    r = random.Random(8)
    prompts = [[r.randrange(2000) for _ in range(r.randrange(1, 100))] for _ in range(10)]
    growing = Sampling(temperature=0.9, seed=3, max_new_tokens=200, logprobs=1, ignore_eos=True)
    asked = [Asked(prompt, growing) for prompt in prompts]
    large, small = make_engine(model), make_engine(model, cache_tokens=64 * 8)
    assert run(small, asked) == run(large, asked)
    assert large.stats.preemptions == 0
    assert small.stats.preemptions >= 5
    assert small.stats.pages_held == 0


@pytest.mark.parametrize("prefill_tokens", [64, 512])
def test_the_budget_of_a_step_is_irrelevant(model, asked, alone, prefill_tokens):
    assert run(make_engine(model, prefill_tokens=prefill_tokens), asked) == alone


def test_the_law_holds_on_a_gpu_s_way_through_the_pages(model):
    """With a kernel that does on a CPU what the real one promises."""
    r = random.Random(9)
    drawn = Sampling(temperature=0.9, seed=4, max_new_tokens=8, logprobs=1, ignore_eos=True)
    lengths = [1, 60, 65, 130, 200, 300]
    asked = [Asked([r.randrange(2000) for _ in range(n)], drawn) for n in lengths]

    def make() -> Engine:
        engine = make_engine(model)
        engine._runner.cache.attend = partial(flash, kernel=slow_kernel)
        return engine

    alone = [outcome for one in asked for outcome in run(make(), [one])]
    assert run(make(), asked) == alone


def test_the_law_holds_with_several_threads(model, asked):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = [outcome for one in asked[:8] for outcome in run(make_engine(model), [one])]
        assert run(make_engine(model), asked[:8]) == alone
    finally:
        torch.set_num_threads(threads)


def test_where_no_other_count_agrees_rows_are_split_up(model, asked, alone):
    engine = make_engine(model)
    runner = engine._runner
    for name in ("prompt_rows", "decode_rows"):
        rows = getattr(runner, name)
        only = lambda n, canonical=rows.canonical: n == canonical  # noqa: E731
        setattr(runner, name, Rows(rows.candidates, rows.canonical, only))
    assert run(engine, asked) == alone


@pytest.fixture(scope="module", params=["lookup", "draft model"])
def speculation(request, model) -> Speculation:
    """Drafts that are right and wrong in turn."""
    if request.param == "lookup":
        return PromptLookup(min_ngram=1, num_tokens=5)
    return DraftModel(first_layers(model, 4), num_tokens=3)


def check_drafted(engine: Engine) -> None:
    stats = engine.stats
    assert 0 < stats.accepted < stats.drafted
    assert stats.pages_held == 0


@pytest.mark.parametrize(("neighbours", "up_to"), [(0, 32), (7, NUM_REQUESTS), (63, NUM_REQUESTS)])
def test_drafted_is_not_drafted(model, asked, alone, speculation, neighbours, up_to):
    engine = make_engine(model, speculation=speculation)
    for first in range(0, up_to, neighbours + 1):
        together = slice(first, first + neighbours + 1)
        assert run(engine, asked[together]) == alone[together]
    check_drafted(engine)


def test_drafted_and_preempted_is_neither(model, asked, alone, speculation):
    engine = make_engine(model, speculation=speculation, prefill_tokens=64)
    r = random.Random(0)

    def send_back() -> None:
        for _ in range(r.choice([0, 0, 1, 3])):
            if len(engine.scheduler.running) > 1:
                engine.scheduler._preempt(engine.scheduler.running[-1])

    assert run(engine, asked, send_back) == alone
    assert engine.stats.preemptions > 20
    check_drafted(engine)


def test_the_engine_is_the_plain_loop(asked):
    """In the loop the last prompt token is computed with the prompt, so this is not bitwise."""
    model = load_model("tiny", dtype=torch.float32)
    engine = make_engine(model, deterministic=False)
    for one, (prompt, sampling) in zip(run(engine, asked), asked, strict=True):
        loop = list(generate(model, prompt, sampling))
        assert [id for id, _, _ in one] == [token.id for token in loop]
        for (_, logprob, _), token in zip(one, loop, strict=True):
            assert abs(logprob - token.logprobs.chosen) < 1e-4
