import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama32.cache.batch import Batch
from llama32.cache.paged_attention import QUERY_TILE
from llama32.engine import runner as runners
from llama32.engine.batch_invariance import CallPlanner, padded_to
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.runner import Runner, decode_mode, graph_sizes, to_span
from llama32.engine.scheduler import Chunk, ScheduledStep
from llama32.engine.settings import EngineSettings
from llama32.engine.token_sampling import SampledToken
from llama32.kernels.packed_linear import TiledLinear
from llama32.model import Llama
from llama32.sampling_params import Sampling
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near

ROOT = Path(__file__).parents[2]
ROUNDED = {"within": 1e-5}
VOCABULARY = 160
C = 64  # slots of a page
NUM_PAGES = 24
FORMS = ["plain", "padded", "split", "static"]


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config())


@pytest.fixture
def own_model() -> Llama:
    """A model that the test may change."""
    return random_model(tiny_config())


def make_runner(model: Llama, form: str = "plain") -> Runner:
    """Return a runner without padding, with padding, with split calls or with fixed shapes."""
    settings = EngineSettings(cache_tokens=C * NUM_PAGES, deterministic=False)
    runner = Runner(model, settings)
    if form == "padded":
        runner.prefill_planner, runner.decode_planner = padded_to([512]), padded_to([8])
    elif form == "split":
        runner.prefill_planner, runner.decode_planner = (
            CallPlanner(lambda n: [], C),
            CallPlanner(lambda n: [], 2),
        )
    elif form == "static":
        runner._has_static_shapes = True
        runner.decode_planner = padded_to(graph_sizes(64))
    return runner


def make_request(length: int, pages: Sequence[int], seed: int = 0, output=()) -> Request:
    """Return a greedy request with all log-probabilities."""
    r = random.Random(seed)
    return Request(
        prompt=[r.randrange(VOCABULARY) for _ in range(length)],
        max_length=2000,
        sampling=Sampling(temperature=0, logprobs=VOCABULARY),
        pages=list(pages),
        output=list(output),
    )


def several() -> list[Request]:
    """Return requests at page borders, with consecutive and with scattered pages."""
    where = [[7, 2, 5, 9], [0], [11, 12], [3], [20, 14]]
    lengths = [200, 1, 64, 30, 65]
    return [
        make_request(*arguments, seed)
        for seed, arguments in enumerate(zip(lengths, where, strict=True))
    ]


def whole(request: Request) -> ScheduledStep:
    """Return a step from the start to the next token of a request."""
    prompt = [Chunk(request, 0, request.num_prefill_tokens)] if request.num_prefill_tokens else []
    return ScheduledStep(prompt, [Chunk(request, request.num_prefill_tokens, request.length)])


def together(steps: Sequence[ScheduledStep]) -> ScheduledStep:
    return ScheduledStep(
        [chunk for step in steps for chunk in step.prefill],
        [chunk for step in steps for chunk in step.decode],
    )


def begin(runner: Runner, requests: Sequence[Request]) -> list[SampledToken]:
    """Run all prompts; return the first token of each request."""
    return keep(runner.run(together([whole(request) for request in requests])))


def go_on(runner: Runner, requests: Sequence[Request]) -> list[SampledToken]:
    """Return the next token of each request."""
    chunks = [Chunk(request, request.length - 1, request.length) for request in requests]
    return keep(runner.run(ScheduledStep([], chunks)))


def keep(tokens: list[SampledToken]) -> list[SampledToken]:
    for sampled in tokens:
        sampled.request.output.append(sampled.id)
    return tokens


def logprobs(sampled: SampledToken) -> Tensor:
    return torch.tensor([sampled.logprobs.top[id] for id in range(VOCABULARY)])


@torch.no_grad()
def uncached(model: Llama, request: Request, length: int) -> Tensor:
    return model(torch.tensor(request.ids(0, length)))[-1].log_softmax(-1)


def check(tokens: list[SampledToken], model: Llama) -> None:
    """Check the last token of each request against the model without a cache."""
    for sampled in tokens:
        expected = uncached(model, sampled.request, sampled.request.length - 1)
        assert_near(logprobs(sampled), expected, **ROUNDED)
        assert sampled.id == expected.argmax()
        assert sampled.error is None


@pytest.mark.parametrize("form", FORMS)
def test_prompts_and_decoding_give_the_logits_of_the_uncached_model(model, form):
    runner, requests = make_runner(model, form), several()
    tokens = begin(runner, requests)
    assert [sampled.request for sampled in tokens] == requests
    check(tokens, model)
    for _ in range(3):
        check(go_on(runner, requests), model)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_read_while_others_are_decoded(model, form):
    runner, requests = make_runner(model, form), several()
    old, new = requests[1:], requests[0]
    begin(runner, old)
    chunks = [Chunk(request, request.length - 1, request.length) for request in old]
    assert [
        sampled.request for sampled in keep(runner.run(ScheduledStep([Chunk(new, 0, 128)], chunks)))
    ] == old
    chunks = [Chunk(request, request.length - 1, request.length) for request in (*old, new)]
    tokens = keep(runner.run(ScheduledStep([Chunk(new, 128, new.num_prefill_tokens)], chunks)))
    assert [sampled.request for sampled in tokens] == [*old, new]
    check(tokens, model)


@pytest.mark.parametrize("form", FORMS)
def test_who_only_reads_its_prompt_gets_no_token(model, form):
    runner, (request, *_) = make_runner(model, form), several()
    assert runner.run(ScheduledStep([Chunk(request, 0, 64)], [])) == []
    assert runner.run(ScheduledStep([Chunk(request, 64, request.num_prefill_tokens)], [])) == []
    check(go_on(runner, [request]), model)


def test_an_empty_step_gives_nothing(model):
    assert make_runner(model).run(ScheduledStep([], [])) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_rows_of_a_replay_are_the_tokens_one_by_one(model, form):
    runner = make_runner(model, form)
    first, other = make_request(62, [4, 5]), make_request(10, [8], seed=1)
    begin(runner, [first, other])
    for _ in range(5):
        go_on(runner, [first, other])
    again = make_request(62, [16, 10], output=first.output)
    tokens = keep(runner.run(together([whole(other), whole(again)])))
    assert [sampled.request for sampled in tokens] == [other, again]
    check(tokens, model)
    for pool in (runner.cache.keys, runner.cache.values):
        before, after = (pool[:, request.pages].flatten(1, 2)[:, :67] for request in (first, again))
        assert_near(after, before, **ROUNDED)


@pytest.mark.parametrize("form", FORMS)
def test_a_replay_gets_its_token_with_the_last_of_its_rows(model, form):
    runner = make_runner(model, form)
    request = make_request(30, [2], output=[5, 6, 7, 8])
    assert runner.run(ScheduledStep([Chunk(request, 0, 29)], [Chunk(request, 29, 32)])) == []
    tokens = keep(runner.run(ScheduledStep([], [Chunk(request, 32, 34)])))
    assert [sampled.request for sampled in tokens] == [request]
    check(tokens, model)


def with_drafts(
    runner: Runner, drafts: Sequence[tuple[Request, Sequence[int]]]
) -> list[SampledToken]:
    """Return the next tokens of each request with its drafts."""
    chunks = []
    for request, tokens in drafts:
        request.drafts = tokens
        chunks.append(Chunk(request, request.length - 1, request.length + len(tokens)))
    sampled = runner.run(ScheduledStep([], chunks))
    for request, _ in drafts:
        request.drafts = ()
    return sampled


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_drafts_give_tokens_up_to_the_first_that_is_wrong_and_the_right_one_for_it(
    model, form, num_right
):
    runner, (first, second, *others) = make_runner(model, form), several()
    begin(runner, [first, second, *others])
    expected = [*first.output], []
    for _ in range(4):
        (sampled,) = go_on(runner, [first])
        expected[1].append((sampled.id, sampled.logprobs))
    first.output = expected[0]
    ids = [id for id, _ in expected[1]]
    drafts = [*ids[:num_right], *[(id + 1) % VOCABULARY for id in ids[num_right:3]]]
    tokens = with_drafts(
        runner, [(second, [3]), (first, drafts), *((other, ()) for other in others)]
    )
    first_tokens = [sampled for sampled in tokens if sampled.request is first]
    assert [sampled.id for sampled in first_tokens] == ids[: num_right + 1]
    for found, (_, logprobs) in zip(first_tokens, expected[1], strict=False):
        assert found.logprobs.chosen == pytest.approx(logprobs.chosen, abs=5e-5)
    assert [sampled.request for sampled in tokens if sampled.request in others] == others
    keep(tokens)
    check(go_on(runner, [first, second, *others]), model)  # what was wrong is written over


@pytest.mark.parametrize("form", FORMS)
def test_a_replay_may_end_in_drafts(model, form):
    runner = make_runner(model, form)
    request = make_request(30, [2], output=[5, 6, 7, 8])
    expected = runner.run(whole(request))[0].id
    request.drafts = [expected, (expected + 1) % VOCABULARY]
    tokens = runner.run(ScheduledStep([Chunk(request, 0, 29)], [Chunk(request, 29, 36)]))
    assert len(tokens) in (2, 3)
    request.drafts = ()
    for sampled in tokens:
        check(keep([sampled]), model)


@pytest.mark.parametrize(
    ("form", "num_padding"), [("plain", 0), ("padded", 1), ("split", 1), ("static", 1)]
)
def test_only_the_slots_of_the_requests_and_of_the_padding_page_are_written(
    model, form, num_padding
):
    runner, requests = make_runner(model, form), several()
    pools = runner.cache.keys, runner.cache.values
    for pool in pools:
        pool.fill_(7)
    begin(runner, requests)
    go_on(runner, requests)
    own = {
        (request.pages[i // C], i % C)
        for request in requests
        for i in range(request.length - 1)  # the last one is known, and not yet computed
    }
    for layer in (layer for pool in pools for layer in pool):
        written = {
            (page, slot) for page, slot in (layer != 7).flatten(2).any(-1).nonzero().tolist()
        }
        assert own <= written
        others = written - own
        assert {page for page, _ in others} <= {runner.num_pages}
        assert len(others) == num_padding


def test_the_padding_page_is_never_allocated(model):
    engine = Engine.of(model, EngineSettings(cache_tokens=C * 3))
    assert engine.stats.pages == engine._runner.num_pages == 3
    assert engine._runner.cache.keys.shape[1] == 4


def test_no_logits_are_computed_of_prompts(own_model):
    runner, requests = make_runner(own_model), several()
    rows = []
    own_model.lm_head.register_forward_hook(lambda *call: rows.append(len(call[-1])))
    begin(runner, requests)
    assert rows == [0, 5]


@pytest.mark.parametrize("length", [2, 40, 64, 200])
def test_the_attention_kernel_depends_on_neither_the_prompt_nor_the_batch(model, length):
    """Flash attention may use a different kernel for a batch of single queries."""
    runner = make_runner(model)
    attend, seen = runner.cache.attend, []

    def spy(q, keys, values, batch):
        seen.append(batch.max_query)
        return attend(q, keys, values, batch)

    runner.cache.attend = spy
    runner.run(whole(make_request(length, [1, 2, 3, 4])))
    num_layers = len(model.layers)
    assert seen == [max(QUERY_TILE, length - 1)] * num_layers + [1] * num_layers


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_nan_is_an_error_of_its_request_and_no_bit_of_the_others_changes(model, form):
    outcomes = []
    for is_poisoned in (False, True):
        runner, requests = make_runner(model, form), several()
        begin(runner, requests)
        if is_poisoned:
            runner.cache.values[1, requests[2].pages[0], 3] = math.nan
        outcomes.append(go_on(runner, requests))
    sound, poisoned = outcomes
    assert [sampled.id for sampled in poisoned if sampled.error] == [-1]
    assert isinstance(poisoned[2].error, FloatingPointError)
    for i in (0, 1, 3, 4):
        assert (poisoned[i].id, poisoned[i].logprobs) == (sound[i].id, sound[i].logprobs)


def test_a_poisoned_request_ends_and_the_others_never_know(model):
    outputs = []
    for is_poisoned in (False, True):
        engine = Engine.of(model, EngineSettings(cache_tokens=C * NUM_PAGES))
        settings = Sampling(temperature=0, max_new_tokens=70)
        requests = [engine.add(request.prompt, settings) for request in several()]
        engine.step()
        if is_poisoned:
            engine._runner.cache.keys[0, requests[0].pages[1]] = math.nan
        while engine.is_busy:
            engine.step()
        outputs.append([request.output for request in requests])
    assert requests[0].finish_reason == "error"
    assert isinstance(requests[0].error, FloatingPointError)
    assert len(requests[0].output) == 1
    assert [request.finish_reason for request in requests[1:]] == ["length"] * 4
    assert outputs[0][1:] == outputs[1][1:]
    assert engine.stats.pages_held == 0


def multiply(model: Llama) -> None:
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(1.5)


def replace_module(model: Llama) -> None:
    model.layers[2].mlp = deepcopy(model.layers[0].mlp)


def replace_weight(model: Llama) -> None:
    model.layers[2].attn.o_proj.weight = nn.Parameter(model.layers[0].attn.o_proj.weight.clone())


def load_weights(model: Llama) -> None:
    model.load_state_dict(random_model(tiny_config(), seed=1).state_dict())


def add_hook(model: Llama) -> None:
    model.layers[1].register_forward_hook(lambda *call: call[-1] * 1.5)


def add_pre_hook(model: Llama) -> None:
    model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))


CHANGES = [multiply, replace_module, replace_weight, load_weights, add_hook, add_pre_hook]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(own_model, change):
    runner = make_runner(own_model)
    before = runner.fingerprint()
    change(own_model)
    assert runner.fingerprint() != before


def test_a_hook_that_is_gone_is_seen(own_model):
    runner = make_runner(own_model)
    bare = runner.fingerprint()
    handle = own_model.layers[1].mlp.register_forward_hook(lambda *call: None)
    hooked = runner.fingerprint()
    handle.remove()
    assert runner.fingerprint() == bare != hooked


def test_what_runs_and_looks_at_the_model_does_not_change_it(own_model):
    runner = make_runner(own_model)
    before = runner.fingerprint()
    begin(runner, several())
    own_model(torch.tensor([1, 2])).sum().backward()
    own_model.eval()
    own_model.state_dict()
    assert runner.fingerprint() == before


@pytest.mark.parametrize("change", CHANGES)
def test_what_an_earlier_model_left_in_the_cache_is_not_used(own_model, change):
    prompt, settings = several()[0].prompt, Sampling(temperature=0, logprobs=1, max_new_tokens=8)

    def run(engine: Engine) -> Request:
        request = engine.add(prompt, settings)
        while engine.is_busy:
            engine.step()
        return request

    engine = Engine.of(own_model, EngineSettings(cache_tokens=C * NUM_PAGES))
    assert [run(engine).num_cached for _ in range(2)] == [0, 192]
    change(own_model)
    changed, again = run(engine), run(engine)
    assert [request.num_cached for request in (changed, again)] == [0, 192]
    fresh = run(Engine.of(own_model, EngineSettings(cache_tokens=C * NUM_PAGES)))
    assert changed.tokens == fresh.tokens


def test_graphs_of_an_earlier_model_are_discarded(own_model):
    engine = Engine.of(own_model, EngineSettings(cache_tokens=C * NUM_PAGES))
    graphs = {(1, 2): object()}
    engine._runner._graphs = graphs
    engine.abort(engine.add([1]))
    assert graphs
    multiply(own_model)
    engine.add([1])
    assert not graphs


CPU, FLASH, NO_FLASH = (
    {"on_gpu": on_gpu, "has_flash": has_flash}
    for on_gpu, has_flash in [(False, False), (True, True), (True, False)]
)


@pytest.mark.parametrize(
    ("where", "settings", "has_graphs", "deterministic"),
    [
        (CPU, {}, False, None),
        (CPU, {"deterministic": True}, False, True),
        (CPU, {"deterministic": False}, False, False),
        (CPU, {"compiled": True}, False, False),
        (FLASH, {}, True, None),
        (FLASH, {"deterministic": True}, True, True),
        (FLASH, {"cuda_graphs": False}, False, None),
        (FLASH, {"compiled": True}, True, False),
        (NO_FLASH, {}, True, False),
        (NO_FLASH, {"deterministic": True}, False, True),
        (NO_FLASH, {"cuda_graphs": True}, True, False),
        (NO_FLASH, {"cuda_graphs": False}, False, None),
        (NO_FLASH, {"cuda_graphs": False, "deterministic": True}, False, True),
    ],
)
def test_graphs_are_for_gpus_and_determinism_is_where_it_can_be_shown(
    where, settings, has_graphs, deterministic
):
    assert decode_mode(EngineSettings(**settings), **where) == (has_graphs, deterministic)


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        (CPU, {"compiled": True}),
        (FLASH, {"compiled": True}),
        (NO_FLASH, {"compiled": True}),
        (NO_FLASH, {"cuda_graphs": True}),
    ],
)
def test_determinism_is_refused_where_it_cannot_be_shown(where, settings):
    with pytest.raises(ValueError, match="deterministic: not together with"):
        decode_mode(EngineSettings(deterministic=True, **settings), **where)


def test_cuda_graphs_are_refused_on_a_cpu(model):
    with pytest.raises(ValueError, match="cuda_graphs: they need CUDA"):
        Runner(model, EngineSettings(cuda_graphs=True, cache_tokens=C))


@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": False}])
def test_on_a_cpu_decoding_is_plain_unless_told(model, settings):
    runner = Runner(model, EngineSettings(cache_tokens=C, **settings))
    assert runner._graphs is None
    assert not runner._has_static_shapes
    assert runner._model is model


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_runner_says_whether_it_is_deterministic(model, deterministic):
    runner = Runner(model, EngineSettings(cache_tokens=C, deterministic=deterministic))
    assert runner.deterministic is deterministic


@pytest.mark.parametrize(
    ("max_running", "rows"),
    [(1, [1]), (2, [1, 2]), (8, [1, 8]), (9, [1, 8, 9]), (64, [1, 8, 64]), (100, [1, 8, 64, 100])],
)
def test_few_counts_of_rows_are_worth_a_graph(max_running, rows):
    assert graph_sizes(max_running) == rows


def decode_all(runner: Runner, counts: Sequence[int], lengths: Sequence[int]) -> None:
    """Run decode steps with each number of rows and each context length."""
    for count in counts:
        for length in lengths:
            long = make_request(length, range(-(-length // C)))
            short = [make_request(1, [NUM_PAGES - 1]) for _ in range(count - 1)]
            chunks = [Chunk(request, len(request.prompt) - 1, request.length) for request in short]
            runner.run(ScheduledStep([], [*chunks, Chunk(long, length - 1, length)]))


def test_static_batches_have_few_shapes(model):
    runner = make_runner(model, "static")
    forward, shapes = runner._forward, set()

    def spy(batch):
        B, W = batch.page_table.shape
        assert len(batch.tokens) == len(batch.lengths) == B
        assert batch.max_length == W * C
        shapes.add((B, W))
        return forward(batch)

    runner._forward = spy
    decode_all(runner, counts=[1, 2, 7, 8, 9, 20], lengths=range(1, C * 17, C))
    assert shapes == {(rows, width) for rows in (1, 8, 64) for width in (2, 4, 8, 16, 32)}


@torch.inference_mode()
def test_what_is_derived_of_a_batch_is_derived_anew_in_every_run(model, monkeypatch):
    """A graph must record the computation, not the value of the first run."""
    runner, known = make_runner(model, "static"), []

    def attend(q: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> Tensor:
        known.append("pages_as_sequences" in vars(batch))
        assert batch.pages_as_sequences
        return q

    monkeypatch.setattr(runners, "static_shape_variant", lambda _: attend)
    batch = runner._pad_batch([to_span(Chunk(make_request(3, [1]), 2, 3))], num_rows=8)
    for _ in range(2):
        runner._forward(batch)
    assert known == [False, True, True] * 2


def test_a_graph_is_made_once_for_each_shape(model, monkeypatch):
    made = []

    class Played:
        """Records nothing: every replay runs the tensors of the batch."""

        def __init__(self, forward, batch):
            made.append(tuple(batch.page_table.shape))
            self.replay = lambda batch: forward(replace(batch, spans=()))

    monkeypatch.setattr(runners, "DecodeGraph", Played)
    runner, requests = make_runner(model, "static"), several()
    runner._graphs = {}
    check(begin(runner, requests), model)
    for _ in range(3):
        check(go_on(runner, requests), model)
        check(go_on(runner, requests[1:2]), model)
    assert sorted(made) == [(1, 2), (8, 4)]


def drive(engine: Engine, steps: int, seed: int) -> list[Request]:
    """Add random requests of several pages during the first `steps` steps; run all to the end."""
    r = random.Random(seed)
    requests: list[Request] = []
    taken = 0
    while taken < steps or engine.is_busy:
        if taken < steps and (not engine.is_busy or r.random() < 0.1):
            for _ in range(r.choice([1, 2, 9])):
                prompt = [r.randrange(32) for _ in range(r.choice([1, 5, 64, 65, 130, 300]))]
                sampling = Sampling(temperature=0, max_new_tokens=r.randrange(1, 200))
                requests.append(engine.add(prompt, sampling))
        engine.step()
        taken += 1
    return requests


def compile_and_drive() -> None:
    """Print the results. For a process without shape checks, which cannot be traced."""
    from torch._dynamo.utils import counters

    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = random_model(tiny_config(**sizes, **heads))
    settings = {"max_running": 12, "cache_tokens": C * 16, "deterministic": False}
    compiled = Engine.of(model, EngineSettings(compiled=True, **settings))
    graphs, reports = [], []

    def on_progress(done: int, of: int) -> None:
        reports.append((done, of))
        graphs.append(counters["stats"]["unique_graphs"])

    compiled.warm_up(on_progress)
    with torch.compiler.set_stance("fail_on_recompile"):
        requests = drive(compiled, 200, seed=0)
    graphs.append(counters["stats"]["unique_graphs"])
    eager = drive(Engine.of(model, EngineSettings(**settings)), 200, seed=0)
    same = [first.output == second.output for first, second in zip(requests, eager, strict=True)]
    preemptions = compiled.stats.preemptions
    results = {"graphs": graphs, "reports": reports, "same": same, "preemptions": preemptions}
    print(json.dumps(results))


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
)


@needs_compiler
def test_a_compiled_engine_says_the_same_and_compiles_nothing_after_it_was_warmed_up():
    code = "from tests.engine.test_runner import compile_and_drive; compile_and_drive()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    none, single, several, at_last = results["graphs"]
    assert 0 == none < single < several == at_last < 20
    assert results["reports"] == [[0, 2], [1, 2], [2, 2]]
    assert results["preemptions"] > 0
    assert len(results["same"]) > 20
    assert all(results["same"])


def test_what_no_compiler_can_see_into_is_refused():
    model = random_model(tiny_config(hidden_size=64), dtype=torch.bfloat16)
    plain = model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(plain, nn.Linear)
    model.set_submodule("layers.0.mlp.up_proj", TiledLinear(plain))
    with pytest.raises(ValueError, match="compiled: not with `optimize` on a CPU"):
        Runner(model, EngineSettings(compiled=True))


def test_what_is_not_compiled_needs_no_warming_up(model):
    reports = []
    Engine.of(model, EngineSettings(cache_tokens=C)).warm_up(
        lambda *arguments: reports.append(arguments)
    )
    assert reports == [(0, 0)]


def test_a_cache_of_bytes_is_refused_where_shapes_must_not_change():
    settings = EngineSettings(cache_dtype="int8", cuda_graphs=True)
    with pytest.raises(ValueError, match="cache_dtype: not together with `cuda_graphs`"):
        decode_mode(settings, on_gpu=True, has_flash=True)
    settings = EngineSettings(cache_dtype="int8")
    assert decode_mode(settings, on_gpu=True, has_flash=True) == (False, None)
    settings = EngineSettings(cache_dtype="int8", compiled=True)
    assert decode_mode(settings, on_gpu=True, has_flash=True) == (False, False)
