"""The engine on a GPU: CUDA graphs and batch invariance. Skipped without CUDA; not yet run on
a GPU."""

import random
from collections.abc import Sequence

import pytest
import torch

from llama32.engine.draft_model import DraftModel
from llama32.engine.engine import Engine
from llama32.engine.prompt_lookup import PromptLookup
from llama32.engine.settings import EngineSettings
from llama32.model import Llama
from llama32.sampling_params import Sampling
from tests.checkpoints import first_layers, random_model, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

Prompts = Sequence[list[int]]


@pytest.fixture(scope="module", params=[64, 128])
def model(request) -> Llama:
    config = tiny_config(head_dim=request.param, vocab_size=1000, hidden_size=256)
    return random_model(config, dtype=torch.bfloat16).cuda()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    r = random.Random(0)
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 130, 300, 500, 700]
    return [[r.randrange(1000) for _ in range(n)] for n in lengths]


def run(engine: Engine, prompts: Prompts) -> list[list]:
    sampling = Sampling(temperature=0.8, seed=1, max_new_tokens=40, logprobs=1, ignore_eos=True)
    requests = [engine.add(prompt, sampling) for prompt in prompts]
    while engine.is_busy:
        engine.step()
    return [[(t.id, t.logprobs.chosen) for t in request.tokens] for request in requests]


def make(model: Llama, **settings) -> Engine:
    given = {"max_running": 16, "cache_tokens": 128 * 200, **settings}
    return Engine.of(model, EngineSettings(**given))


def test_graphs_give_the_bits_of_eager_steps_of_the_same_rows(model, prompts):
    graphs, eager = (make(model, deterministic=False, cuda_graphs=True) for _ in range(2))
    eager._runner._graphs = None  # the same shapes, without graphs
    assert run(graphs, prompts) == run(eager, prompts)
    assert graphs._runner._graphs


def test_graphs_are_captured_when_they_are_first_needed_and_then_replayed(model, prompts):
    engine = make(model, deterministic=False, cuda_graphs=True)
    assert not engine._runner._graphs
    run(engine, prompts[:1])
    captured = dict(engine._runner._graphs)
    run(engine, prompts[:1])
    assert engine._runner._graphs == captured


def test_a_step_that_replays_a_graph_more_than_once_loses_no_row(model, prompts):
    """A replay has more rows than the largest graph."""
    engine, crowded = (make(model, deterministic=True, max_running=2) for _ in range(2))
    expected = run(engine, prompts[-2:])
    sampling = Sampling(temperature=0.8, seed=1, max_new_tokens=40, logprobs=1, ignore_eos=True)
    requests = [crowded.add(prompt, sampling) for prompt in prompts[-2:]]
    while min(len(request.output) for request in requests) < 30:
        crowded.step()
    crowded.scheduler._preempt(requests[1])
    while crowded.is_busy:
        crowded.step()
    found = [[(t.id, t.logprobs.chosen) for t in request.tokens] for request in requests]
    assert found == expected


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_request_has_the_same_bits_in_any_batch(model, prompts, cuda_graphs):
    settings = {"deterministic": True, "cuda_graphs": cuda_graphs}
    alone = [outcome for prompt in prompts for outcome in run(make(model, **settings), [prompt])]
    together = make(model, **settings)
    assert run(together, prompts) == alone
    assert run(together, prompts) == alone  # with prefix hits


@pytest.mark.parametrize("kind", ["lookup", "draft model"])
def test_a_request_has_the_same_bits_with_drafts(model, prompts, kind):
    lookup = PromptLookup(min_ngram=1)
    speculation = lookup if kind == "lookup" else DraftModel(first_layers(model, 2).cuda())
    engine = make(model, deterministic=True, speculation=speculation)
    assert run(engine, prompts) == run(make(model, deterministic=True), prompts)
    assert engine.stats.drafted > 0


def test_without_flash_attention_determinism_goes_without_graphs(prompts):
    model = random_model(tiny_config(vocab_size=1000)).cuda()
    engine = make(model, deterministic=True)
    assert engine._runner._graphs is None
    alone = [
        outcome
        for prompt in prompts[:4]
        for outcome in run(make(model, deterministic=True), [prompt])
    ]
    assert run(engine, prompts[:4]) == alone
