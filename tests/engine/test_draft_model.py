import math

import pytest
import torch

from llama32.cache.kv_cache import bytes_per_token
from llama32.engine.cache_size import num_pages
from llama32.engine.draft_model import DraftModel, ModelDrafter
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings
from llama32.model import Llama
from llama32.sampling_params import Sampling
from tests.checkpoints import random_model, tiny_config
from tests.engine.fakes import make_prompt

C = 64
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, logprobs=3)


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config())


@pytest.fixture(scope="module")
def smaller() -> Llama:
    """A model with a different shape and different weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    return random_model(tiny_config(num_attention_heads=2, num_key_value_heads=1, **sizes), seed=1)


def make_drafter(model: Llama, num_tokens: int = 4, budget: int = 512) -> ModelDrafter:
    settings = EngineSettings(page_size=C, cache_tokens=C * 24, prefill_tokens=budget)
    return DraftModel(model, num_tokens).drafter(model.config, settings)


def make_request(length: int, sampling: Sampling = GREEDY, seed: int = 0) -> Request:
    """Return a request with its own pages and room to grow."""
    prompt = [token % 160 for token in make_prompt(length, seed)]
    pages = [6 * seed + i for i in range(6)]
    return Request(prompt=prompt, max_length=C * 6, sampling=sampling, seed=seed, pages=pages)


def continued(model: Llama, request: Request, count: int) -> list[int]:
    """Return the model's next tokens without speculation."""
    sampling = dict(vars(request.sampling), seed=request.seed, logprobs=None, max_new_tokens=400)
    engine = Engine.of(model, EngineSettings(cache_tokens=C * 24))
    copy = engine.add(request.prompt, Sampling(**sampling))
    copy.output += request.output  # as after a preemption
    start = len(request.output)
    while len(copy.output) < start + count:
        engine.step()
    return copy.output[start:][:count]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_drafts_are_what_the_smaller_model_would_say(smaller, sampling):
    drafter = make_drafter(smaller)
    requests = [make_request(length, sampling, seed) for seed, length in enumerate((1, 64, 150))]
    expected = {request: continued(smaller, request, 4) for request in requests}
    assert drafter.propose(dict.fromkeys(requests, 4)) == expected


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("num_accepted", range(5))
def test_it_goes_on_from_what_has_become_of_its_drafts(smaller, sampling, num_accepted):
    drafter = make_drafter(smaller)
    first, second = make_request(70, sampling), make_request(5, sampling, seed=1)
    for _ in range(4):
        drafts = drafter.propose({first: 4, second: 4})
        for request in (first, second):
            assert drafts[request] == continued(smaller, request, 4)
        first.output += [*drafts[first][:num_accepted], 7]
        second.output += [*drafts[second], 8]


def test_each_gets_as_many_as_asked_for(smaller):
    drafter = make_drafter(smaller)
    requests = [make_request(10, seed=seed) for seed in range(3)]
    drafts = drafter.propose(dict(zip(requests, (1, 4, 2), strict=True)))
    assert [len(drafts[request]) for request in requests] == [1, 4, 2]
    for request in requests:
        assert drafts[request] == continued(smaller, request, len(drafts[request]))
    assert drafter.propose({}) == {}


@pytest.mark.parametrize("num_accepted", range(3))
def test_who_was_not_asked_for_a_while_is_read_up_to_now(smaller, num_accepted):
    drafter = make_drafter(smaller)
    request = make_request(2)
    for i in range(5):
        drafts = drafter.propose({request: 4})[request]
        request.output += [*drafts[:num_accepted], *range(9 * i, 9 * i + 9)]
        assert drafter.propose({request: 3})[request] == continued(smaller, request, 3)


def test_no_more_is_read_in_a_step_than_the_budget_and_meanwhile_there_are_no_drafts(smaller):
    drafter = make_drafter(smaller, budget=64)
    long, short = make_request(150), make_request(10, seed=1)
    found = [drafter.propose({long: 4, short: 4}) for _ in range(4)]
    assert [len(drafts[long]) for drafts in found] == [0, 0, 4, 4]
    assert [len(drafts[short]) for drafts in found] == [4] * 4
    assert found[-1][long] == continued(smaller, long, 4)


def test_of_a_request_that_was_released_nothing_is_taken_for_read(smaller):
    drafter = make_drafter(smaller)
    request = make_request(100)
    expected = drafter.propose({request: 4})
    drafter.release(request)
    request.pages = [20, 21]
    drafter._runner.cache.keys[:, :6] = math.nan
    assert drafter.propose({request: 4}) == expected
    drafter.release(request)
    drafter.release(request)
    assert not drafter._draft_requests


def test_a_step_that_fails_leaves_it_able_to_go_on(smaller):
    drafter = make_drafter(smaller)
    request = make_request(70)
    run, fails = drafter._runner.run, [False, False, True]

    def sometimes(step):
        if fails and fails.pop(0):
            raise RuntimeError("out of memory")
        return run(step)

    drafter._runner.run = sometimes
    with pytest.raises(RuntimeError):
        drafter.propose({request: 4})
    assert drafter.propose({request: 4})[request] == continued(smaller, request, 4)


def test_a_smaller_model_that_makes_no_sense_drafts_nothing_and_ends_nobody(model, smaller):
    drafter = make_drafter(smaller)
    requests = [make_request(10, seed=seed) for seed in range(2)]
    drafter.propose(dict.fromkeys(requests, 4))
    drafter._runner.cache.values[0, requests[0].pages[0], 3] = math.nan
    for request in requests:
        request.output.append(1)
    drafts = drafter.propose(dict.fromkeys(requests, 4))
    assert drafts[requests[0]] == []
    assert len(drafts[requests[1]]) == 4


def test_a_model_that_drafts_for_itself_is_always_right(model):
    settings = EngineSettings(cache_tokens=C * 24, speculation=DraftModel(model))
    engine = Engine.of(model, settings)
    for seed, length in enumerate((1, 64, 150)):
        prompt = make_request(length).prompt
        engine.add(prompt, Sampling(temperature=0.8, seed=seed, max_new_tokens=60))
    while engine.is_busy:
        engine.step()
    assert engine.stats.acceptance_rate == 1
    assert engine.stats.steps == 12
    assert not engine._speculator._drafter._draft_requests


def test_logprobs_are_not_computed_of_drafts(smaller):
    drafter, logprobs = make_drafter(smaller), []
    run = drafter._runner.run

    def spy(step):
        logprobs.extend(chunk.request.sampling.logprobs for chunk in step.decode)
        return run(step)

    drafter._runner.run = spy
    drafter.propose({make_request(5, DRAWN): 2})
    assert logprobs == [None, None]


def test_a_model_with_another_vocabulary_is_refused(model):
    other = random_model(tiny_config(vocab_size=161))
    match = (
        "DraftModel: the draft model's vocabulary has 161 tokens, the engine's model has 160; use"
    )
    with pytest.raises(ValueError, match=match):
        Engine.of(model, EngineSettings(cache_tokens=C, speculation=DraftModel(other)))


def test_to_draft_nothing_is_refused(model):
    with pytest.raises(ValueError, match="DraftModel: num_tokens is 0, allowed: 1 or more"):
        DraftModel(model, num_tokens=0)


def test_it_has_the_pages_of_the_engine_s_cache_and_need_not_be_deterministic(model, smaller):
    speculation = DraftModel(smaller)
    settings = EngineSettings(cache_tokens=C * 7, deterministic=True, speculation=speculation)
    engine = Engine.of(model, settings)
    cache, draft_cache = engine._runner.cache, engine._speculator._drafter._runner.cache
    assert draft_cache.keys.shape[1:3] == cache.keys.shape[1:3] == (8, C)
    assert draft_cache.keys.shape[0] == 1
    assert not engine._speculator._drafter._runner.deterministic


def test_the_memory_for_the_cache_is_that_of_both(model, smaller):
    of_model = bytes_per_token(model.config, torch.float32)
    of_both = of_model + bytes_per_token(smaller.config, torch.float32)
    room = 10 * C * of_both
    alone = EngineSettings(cache_bytes=room)
    both = EngineSettings(cache_bytes=room, speculation=DraftModel(smaller))
    assert num_pages(model, both) == 10
    assert num_pages(model, alone) == 10 * of_both // of_model


def test_the_model_is_not_part_of_what_the_settings_say_of_themselves(model):
    assert repr(DraftModel(model)) == "DraftModel(num_tokens=4)"
