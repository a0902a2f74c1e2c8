"""Every stage of sampling against transformers, and batch invariance."""

import math
import random
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama32 import sampling
from llama32.sampling import (
    apply_bias,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_presence_frequency,
    penalize_repetition,
    sample,
    sample_categorical,
    uniform,
)
from llama32.sampling_params import Sampling
from tests.chance import chi_square

ALMOST_ONE = 1 - 2.0**-53


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def warped(logits: torch.Tensor, *warpers: Any) -> torch.Tensor:
    for warper in warpers:
        logits = warper(None, logits)  # warpers ignore the ids
    return logits


def kept(scores: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in scores]


def next_ids(logits: torch.Tensor, setting: Sampling, seed: int, steps: int) -> torch.Tensor:
    """Return the tokens of one request at every step with constant logits and no penalties."""
    rows = [setting] * steps
    outputs = [[0] * step for step in range(steps)]
    return sample(logits.expand(steps, -1), rows, [[]] * steps, outputs, [seed] * steps).ids


# The stages


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.99, 0.9999])
def test_top_p_keeps_what_transformers_keeps(top_p):
    logits = random_logits(30, 1000)
    assert kept(keep_top_p(logits, top_p)) == kept(warped(logits, TopPLogitsWarper(top_p)))


@pytest.mark.parametrize("k", [1, 2, 50, 999, 1000, 5000])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = random_logits(30, 1000)
    assert torch.equal(keep_top_k(logits, k), warped(logits, TopKLogitsWarper(k)))


@pytest.mark.parametrize("min_p", [0.0, 1e-6, 0.01, 0.1, 0.9, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p):
    logits = random_logits(30, 1000)
    assert torch.equal(keep_min_p(logits, min_p), warped(logits, MinPLogitsWarper(min_p)))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_gives_what_transformers_gives(penalty):
    logits = random_logits(4, 50)
    ids: Any = torch.randint(50, (4, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_temperature_gives_what_transformers_gives():
    logits = random_logits(4, 50)
    assert torch.equal(apply_temperature(logits, 0.6), warped(logits, TemperatureLogitsWarper(0.6)))


def test_presence_and_frequency_penalties_follow_openais_formula():
    logits = random_logits(3, 6)
    outputs = [[], [1, 1, 5], [0, 2, 2, 2]]
    counts = torch.tensor([[ids.count(token) for token in range(6)] for ids in outputs])
    penalized = penalize_presence_frequency(logits, counts, 0.5, 0.25)
    for row, ids in enumerate(outputs):
        for token in range(6):
            c = ids.count(token)
            expected = logits[row, token] - c * 0.25 - float(c > 0) * 0.5
            assert penalized[row, token] == expected


def test_bias_is_added_to_the_named_tokens():
    logits = random_logits(2, 4)
    biased = apply_bias(logits, [{}, {0: 2.0, 3: -100.0}])
    assert torch.equal(biased, logits + torch.tensor([[0, 0, 0, 0], [2.0, 0, 0, -100]]))


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="logit_bias: token id 4 is outside the vocabulary of 4"):
        apply_bias(random_logits(1, 4), [{4: 1.0}])


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        (keep_top_p, [0.2, 0.9, 1.0]),
        (keep_top_k, [1, 7, 900]),
        (keep_min_p, [0.5, 0.01, 0.0]),
        (apply_temperature, [0.1, 1.0, 3.0]),
    ],
)
def test_a_parameter_per_row_equals_a_row_alone(stage, values):
    logits = random_logits(3, 100)
    together = stage(logits, torch.tensor(values).unsqueeze(-1))
    for row, value in enumerate(values):
        assert torch.equal(together[row], stage(logits[row], value))


def test_top_p_keeps_the_token_that_crosses_p_and_no_more():
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    assert kept(keep_top_p(logits, 0.5)[None]) == [[1]]
    assert kept(keep_top_p(logits, 0.51)[None]) == [[1, 3]]
    assert kept(keep_top_p(logits, 0.80)[None]) == [[0, 1, 3]]


def test_of_equal_tokens_the_lowest_ids_are_kept():
    logits = torch.tensor([[0.0, 1, 1, 1, 1, 0]])
    assert kept(keep_top_k(logits, 2)) == [[1, 2]]
    assert kept(keep_top_k(logits, 5)) == [[0, 1, 2, 3, 4]]
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [[0, 1]]
    assert kept(keep_top_p(torch.zeros(1, 1000), 0.3005)) == [list(range(301))]


# The random numbers


def test_the_uniform_of_a_seed_and_step_never_changes():
    assert uniform(0, 0) == 0.6400741756716787
    assert uniform(2**64 - 1, 100_000) == 0.029480595072727045
    assert uniform(-1, 0) != uniform(1, 0)
    assert uniform(1, 23) != uniform(12, 3)


@pytest.mark.parametrize("stride", [(1, 0), (0, 1), (1, 1)])
def test_uniforms_of_consecutive_seeds_and_steps_are_even_and_independent(stride):
    n = 20_000
    values = torch.tensor([uniform(7 + stride[0] * i, stride[1] * i) for i in range(n)])
    assert values.min() >= 0
    assert values.max() < 1
    bins = (values * 10).long()
    assert abs(chi_square(bins.bincount(minlength=10), torch.full((10,), 0.1))) < 4
    pairs = 10 * bins[1:] + bins[:-1]
    assert abs(chi_square(pairs.bincount(minlength=100), torch.full((100,), 0.01))) < 4


def test_evenly_spaced_uniforms_draw_each_token_by_its_probability():
    n = 10_000
    probabilities = torch.rand(20, generator=torch.Generator().manual_seed(0))
    probabilities = probabilities / probabilities.sum()
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = sample_categorical(probabilities.expand(n, -1), uniforms).bincount(minlength=20)
    assert ((counts - n * probabilities).abs() <= 1).all()


def test_a_draw_takes_the_token_at_the_uniform_in_the_cumulative_sum():
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75], dtype=torch.float64)
    assert sample_categorical(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3]
    assert sample_categorical(8 * probabilities, uniforms).tolist() == [0, 0, 2, 2, 3]
    assert sample_categorical(probabilities[0], uniforms[4]).item() == 3
    assert sample_categorical(
        probabilities[:4].view(2, 2, 4), uniforms[:4].view(2, 2)
    ).tolist() == [
        [0, 0],
        [2, 2],
    ]


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, ALMOST_ONE])
def test_a_token_of_probability_zero_is_never_drawn(u):
    uniforms = torch.full((300,), u, dtype=torch.float64)
    weights = torch.rand(300, 50, generator=torch.Generator().manual_seed(0))
    weights[weights < 0.9] = 0
    weights[:, 25] = 0.3
    ids = sample_categorical(weights / weights.sum(-1, keepdim=True), uniforms)
    assert (weights.gather(1, ids[:, None]) > 0).all()
    assert sample_categorical(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(u)).item() == 1


# The sampled token


def random_setting(rng: random.Random, vocabulary: int) -> Sampling:
    """Return random settings: greedy or not, every other field set or default."""

    def maybe(value, default):
        return value if rng.random() < 0.4 else default

    tokens = rng.sample(range(vocabulary), 3)
    return Sampling(
        temperature=rng.choice([0, 1e-6, 0.1, 0.6, 1.0, 5.0]),
        top_k=maybe(rng.randint(1, 2 * vocabulary), None),
        top_p=maybe(rng.uniform(0.01, 1), None),
        min_p=maybe(rng.uniform(0, 1), None),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe({token: rng.uniform(-5, 5) for token in tokens}, {}),
        logprobs=maybe(rng.randint(0, vocabulary), None),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [8, 77, 1001])
def test_a_row_is_the_same_alone_in_any_batch_and_at_any_index(dtype, vocabulary):
    rng = random.Random(vocabulary)
    for trial in range(12):
        B = rng.randint(2, 20)
        logits = random_logits(B, vocabulary, seed=trial).to(dtype)
        rows = [
            (
                random_setting(rng, vocabulary),
                [rng.randrange(vocabulary) for _ in range(rng.randint(0, 9))],
                [rng.randrange(vocabulary) for _ in range(rng.randint(0, 9))],
                rng.randrange(2**64),
            )
            for _ in range(B)
        ]
        whole = sample(logits, *zip(*rows, strict=True))
        for row in range(B):
            alone = sample(logits[row : row + 1], *zip(*[rows[row]], strict=True))
            assert torch.equal(alone.ids, whole.ids[row : row + 1])
            assert alone.logprobs == [whole.logprobs[row]]
        subset = rng.sample(range(B), rng.randint(1, B))
        moved = sample(logits[subset], *zip(*(rows[row] for row in subset), strict=True))
        assert torch.equal(moved.ids, whole.ids[subset])
        assert moved.logprobs == [whole.logprobs[row] for row in subset]


def test_a_draw_depends_on_seed_and_step_alone():
    logits = torch.zeros(1, 500)
    ids = next_ids(logits, Sampling(), seed=3, steps=20)
    for step in reversed(range(20)):
        alone = sample(logits, [Sampling()], [[5, 5]], [[1] * step], [3])
        assert alone.ids.item() == ids[step] == int(500 * uniform(3, step))
    assert not torch.equal(ids, next_ids(logits, Sampling(), seed=4, steps=20))


def test_sampled_tokens_follow_the_probabilities_of_transformers():
    logits = random_logits(1, 40, seed=5) / 5
    setting = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    warpers = TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)
    expected = warped(logits, *warpers)
    counts = next_ids(logits, setting, seed=1, steps=4000).bincount(minlength=40)
    assert 5 < len(kept(expected)[0]) < 20
    assert abs(chi_square(counts, expected.softmax(-1)[0])) < 3


def test_min_p_comes_after_temperature_and_before_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    flat = Sampling(temperature=1e6, min_p=0.9)
    assert set(next_ids(logits, flat, seed=0, steps=100).tolist()) == {0, 1, 2, 3}
    both = Sampling(min_p=0.6, top_p=0.55)  # 0.4 and 0.3 remain, and 0.4 is 57% of 0.7
    assert set(next_ids(logits, both, seed=0, steps=100).tolist()) == {0}


def test_top_k_comes_before_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = Sampling(top_k=2, top_p=0.55)
    assert set(next_ids(logits, both, seed=0, steps=100).tolist()) == {0}


def test_bias_comes_before_the_repetition_penalty():
    logits = torch.tensor([[1.0, 2.0]])
    setting = Sampling(temperature=0, repetition_penalty=2, logit_bias={0: 2.0})
    assert sample(logits, [setting], [[0]], [[]], [0]).ids.tolist() == [1]  # (1 + 2) / 2 < 2


def test_greedy_takes_the_argmax_after_bias_and_penalties():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).expand(6, -1)
    settings = [
        Sampling(temperature=0),
        Sampling(temperature=0, repetition_penalty=2.0),  # 5/2 and 4/2 for both seen tokens
        Sampling(temperature=0, presence_penalty=1.5),  # output only: 4 - 1.5
        Sampling(temperature=0, frequency_penalty=-0.6),  # 4 + 2 * 0.6
        Sampling(temperature=0, logit_bias={3: 3.5}),
        Sampling(temperature=0, logit_bias={0: -100}, presence_penalty=1.5),
    ]
    output = sample(logits, settings, [[0]] * 6, [[1, 1]] * 6, [0] * 6)
    assert output.ids.tolist() == [0, 2, 0, 1, 3, 2]


@pytest.mark.parametrize("setting", [Sampling(temperature=0), Sampling(top_k=1)])
def test_of_equal_maxima_the_lowest_id_is_sampled(setting):
    logits = random_logits(1, 300).clamp(max=1)
    assert next_ids(logits, setting, seed=0, steps=50).unique().tolist() == [
        int((logits[0] == 1).nonzero()[0])
    ]


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = random_logits(1, 300)
    ids = next_ids(logits, Sampling(temperature=temperature), seed=0, steps=10)
    assert (ids == logits.argmax()).all()


def test_bf16_logits_are_not_rounded_again():
    logits = torch.ones(1, 3, dtype=torch.bfloat16)
    setting = Sampling(temperature=0, logit_bias={2: 0.001})
    assert sample(logits, [setting], [[]], [[]], [0]).ids.tolist() == [2]


def test_a_masked_token_is_never_sampled():
    logits = torch.full((1, 30), -math.inf)
    logits[0, [3, 29]] = 0
    for setting in (Sampling(), Sampling(top_k=10), Sampling(top_p=0.999), Sampling(min_p=0.0)):
        assert set(next_ids(logits, setting, seed=0, steps=100).tolist()) == {3, 29}


def test_a_stage_runs_only_on_rows_with_the_stage(monkeypatch):
    rows = {}

    def spy(name):
        stage = getattr(sampling, name)

        def counted(logits, *rest):
            rows[name] = rows.get(name, 0) + len(logits)
            return stage(logits, *rest)

        return counted

    stages = (
        "apply_bias",
        "penalize_repetition",
        "penalize_presence_frequency",
        "apply_temperature",
    )
    stages += ("keep_min_p", "keep_top_k", "keep_top_p", "sample_categorical")
    for name in stages:
        monkeypatch.setattr(sampling, name, spy(name))

    greedy = Sampling(temperature=0, top_p=0.9, top_k=5, min_p=0.1)
    plain = Sampling(top_p=1.0, min_p=0.0)
    settings = [greedy, plain, greedy, Sampling(top_p=0.9), Sampling(logit_bias={1: 1.0})]
    logits = random_logits(5, 20)
    sample(logits, settings, [[]] * 5, [[]] * 5, [0] * 5)
    assert rows == {
        "apply_temperature": 3,
        "sample_categorical": 3,
        "keep_top_p": 1,
        "apply_bias": 1,
    }

    rows.clear()
    assert greedy.stages == frozenset()  # so greedy rows form one group
    output = sample(logits, [greedy] * 5, [[]] * 5, [[]] * 5, [0] * 5)
    assert rows == {}
    assert torch.equal(output.ids, logits.argmax(-1))


def test_extreme_settings_still_sample_a_token():
    logits = 30 * random_logits(1, 50)
    extremes = [
        {"temperature": 1e6},
        {"temperature": 1.1e-5},
        {"temperature": 1.1e-5, "top_p": 1e-300, "min_p": 1.0, "top_k": 2**31 - 1},
        {"repetition_penalty": 0.01, "frequency_penalty": -100},
        {"repetition_penalty": 100, "presence_penalty": 100},
        {"logit_bias": dict.fromkeys(range(50), -100)},
    ]
    seen = list(range(50)) * 1000
    for fields in extremes:
        ids = sample(logits, [Sampling(**fields)], [seen], [seen], [0]).ids
        assert 0 <= ids.item() < 50


def test_sampling_does_not_change_the_logits():
    logits = random_logits(3, 20)
    before = logits.clone()
    setting = Sampling(
        logit_bias={1: 3}, repetition_penalty=1.5, presence_penalty=1, min_p=0.1, top_k=5, top_p=0.5
    )
    sample(logits, [setting] * 3, [[1, 2]] * 3, [[3]] * 3, [0] * 3)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("setting", [Sampling(), Sampling(temperature=0), Sampling(top_p=0.5)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_infinite_logits_raise(setting, value):
    logits = random_logits(2, 20)
    logits[1, 7] = value
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        sample(logits, [setting] * 2, [[]] * 2, [[]] * 2, [0] * 2)
    logits[1] = -math.inf
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        sample(logits, [setting] * 2, [[]] * 2, [[]] * 2, [0] * 2)


# Log-probabilities


def test_logprobs_are_of_the_model_before_any_stage():
    logits = random_logits(3, 100)
    settings = [
        Sampling(temperature=0.3, top_k=3, logit_bias={7: 100.0}, logprobs=4),
        Sampling(logprobs=0),
        Sampling(temperature=0),
    ]
    output = sample(logits, settings, [[]] * 3, [[]] * 3, [0] * 3)
    expected = logits.log_softmax(-1)
    first, second, third = output.logprobs

    assert first is not None
    assert output.ids[0] == 7
    assert first.chosen == pytest.approx(expected[0, 7].item(), abs=1e-5)
    values, ids = expected[0].topk(4)
    assert list(first.top) == ids.tolist()
    assert list(first.top.values()) == pytest.approx(values.tolist(), abs=1e-5)

    assert second is not None
    assert second.chosen == pytest.approx(expected[1, output.ids[1]].item(), abs=1e-5)
    assert second.top == {}
    assert third is None


def test_equally_likely_tokens_are_listed_by_id_in_top_logprobs():
    logits = torch.tensor([[0.0, 2, 1, 2, 1, 1]])
    for n, expected in ((2, [1, 3]), (4, [1, 3, 2, 4]), (99, [1, 3, 2, 4, 5, 0])):
        (logprobs,) = sample(logits, [Sampling(logprobs=n)], [[]], [[]], [0]).logprobs
        assert logprobs is not None
        assert list(logprobs.top) == expected


def test_logprobs_of_bf16_logits_are_exact_to_fp32():
    logits = random_logits(1, 1000).bfloat16()
    (logprobs,) = sample(logits, [Sampling(temperature=0, logprobs=0)], [[]], [[]], [0]).logprobs
    assert logprobs is not None
    assert logprobs.chosen == logits.double().log_softmax(-1).max().float().item()
