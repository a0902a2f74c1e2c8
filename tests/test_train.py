import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama32.train import (
    IGNORED,
    Recipe,
    held_out_loss,
    initialize,
    learning_rate,
    next_token_loss,
    pack,
    train,
)
from tests.checkpoints import random_model, tiny_config

RECIPE = Recipe(steps=12, batch=2, context=16, warmup=2, save_every=4)
COUNTING = torch.arange(1000) % 100


def fresh_model():
    model = random_model(tiny_config(vocab_size=100))
    initialize(model, seed=1)
    return model


def run(folder: Path, steps: int = 12, until: int | None = None):
    """Train on counting; `until` kills the run when it asks for the tokens of a later step."""
    model = fresh_model()
    seen = []

    def epochs(epoch: int) -> torch.Tensor:
        seen.append(epoch)
        if until is not None and len(seen) > until:
            raise KeyboardInterrupt
        return COUNTING[:120]  # few batches per epoch, so a run passes through several epochs

    recipe = replace(RECIPE, steps=steps)
    return model, train(model, epochs, COUNTING[:100], recipe, folder)


def test_training_lowers_both_losses(tmp_path):
    _, history = run(tmp_path, steps=60)
    (_, first, first_held_out), (step, last, last_held_out) = history[0], history[-1]
    assert step == 60
    assert last < 0.6 * first
    assert last_held_out < 0.6 * first_held_out


def test_a_run_that_was_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    whole, history = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", until=3)
    assert (tmp_path / "killed" / "training.pt").exists()
    resumed, resumed_history = run(tmp_path / "killed")
    assert resumed_history == history
    for ours, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_a_finished_run_is_not_trained_again(tmp_path):
    trained, history = run(tmp_path)
    again, same = run(tmp_path, until=0)
    assert same == history
    assert torch.equal(again.embed.weight, trained.embed.weight)


def test_the_loss_is_the_mean_over_the_targets_asked_for():
    model = fresh_model()
    tokens, targets = torch.randint(100, (2, 3, 8))
    targets[:, :5] = IGNORED
    with torch.no_grad():
        logprobs = model(tokens).log_softmax(-1)
        asked = logprobs[:, 5:].gather(-1, targets[:, 5:, None])
        torch.testing.assert_close(next_token_loss(model, tokens, targets), -asked.mean())
        shifted = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
        assert torch.equal(next_token_loss(model, tokens), shifted)


def test_packing_loses_nothing_and_depends_on_the_seed_alone():
    documents = [[i, i + 100, i + 200] for i in range(20)]
    packed = pack(documents, seed=3)
    assert sorted(packed.unflatten(0, (20, 3)).tolist()) == documents
    assert torch.equal(packed, pack(documents, seed=3))
    assert not torch.equal(packed, pack(documents, seed=4))


def test_the_rate_climbs_then_falls_to_its_floor():
    recipe = Recipe(steps=100, warmup=10, peak_rate=1.0, final_rate=0.1)
    rates = [learning_rate(step, recipe) for step in range(101)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_fresh_weights_predict_about_evenly():
    model = fresh_model()
    assert held_out_loss(model, COUNTING, RECIPE) == pytest.approx(math.log(100), abs=0.1)
    assert model.layers[0].attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    scaled = 0.02 / math.sqrt(2 * len(model.layers))
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(scaled, rel=0.1)


def test_the_whole_gradient_is_clipped_to_the_norm_of_the_recipe(tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        clip(parameters, max_norm)
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in parameters]).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(fresh_model(), lambda epoch: COUNTING, COUNTING, replace(RECIPE, clip=0.01), tmp_path)
    assert norms == pytest.approx([0.01] * RECIPE.steps, rel=1e-3)


def test_matrices_decay_and_norms_and_embeddings_do_not(tmp_path):
    """At a rate of nothing but decay: a gradient clipped to zero moves no weight by itself."""
    model = fresh_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    recipe = replace(RECIPE, clip=0.0, warmup=1, weight_decay=0.5, steps=2)
    train(model, lambda epoch: COUNTING, COUNTING, recipe, tmp_path)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or name == "embed.weight":
            assert torch.equal(weight, before[name]), name
        else:
            assert weight.norm() < before[name].norm(), name


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="10 tokens do not fill a row of 16"):
        held_out_loss(fresh_model(), COUNTING[:10], RECIPE)
