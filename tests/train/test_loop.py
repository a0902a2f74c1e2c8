import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama32 import Llama, add_lora, capture
from llama32.train.data import Example, Step, cut, packed, predicting, text_rows, together
from llama32.train.loop import next_token_loss, summed_loss, train
from llama32.train.recipe import Recipe, initialize
from tests.checkpoints import random_model, tiny_config

RECIPE = Recipe(steps=12, warmup=2, save_every=4)
COUNTING = torch.arange(1000) % 100
UNSEEN = [predicting(rows) for rows in cut(COUNTING[:100], 16).split(2)]
DIALOGS = [
    Example([*range(i, i + 3 + i % 7)], [False, False, *[True] * (1 + i % 7)]) for i in range(1, 30)
]


def fresh_model() -> Llama:
    model = random_model(tiny_config(vocab_size=100))
    initialize(model, seed=1)
    return model


def counting(until: int | None = None):
    """Few batches an epoch, so a run passes through several; `until` kills it at a later one."""
    seen = []

    def epoch(number: int) -> torch.Tensor:
        seen.append(number)
        if until is not None and len(seen) > until:
            raise KeyboardInterrupt
        return COUNTING[:120]

    return text_rows(epoch, context=16, batch=2)


def run(folder: Path, until: int | None = None, **changes):
    model = fresh_model()
    curve = train(model, counting(until), UNSEEN, replace(RECIPE, **changes), folder)
    return model, curve


def assert_same_weights(ours: Llama, expected: Llama) -> None:
    for one, other in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def gradients(model: Llama) -> list[torch.Tensor]:
    found = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return found


def test_training_lowers_both_losses(tmp_path):
    _, curve = run(tmp_path, steps=60)
    assert [point.step for point in curve] == list(range(0, 61, 4))
    assert curve[0].train is None
    assert curve[0].held_out == pytest.approx(math.log(100), abs=0.1)
    _, seen, unseen = zip(*curve[1:], strict=True)
    assert seen[-1] < 0.6 * seen[0]
    assert unseen[-1] < 0.6 * unseen[0]


def test_a_run_that_was_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    whole, curve = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", until=3)
    assert (tmp_path / "killed" / "training.pt").exists()
    resumed, its_curve = run(tmp_path / "killed")
    assert its_curve == curve
    assert_same_weights(resumed, whole)


def test_an_adapter_with_dropout_is_resumed_as_exactly_and_its_base_is_not_kept(tmp_path):
    def adapted(folder: Path, kill_at: int | None = None) -> Llama:
        model = fresh_model()
        add_lora(model, rank=2, dropout=0.5)
        steps = packed(DIALOGS, context=32, batch=2)

        def until_killed(first: int) -> Iterator[Step]:
            for number, step in enumerate(steps(first), start=first):
                if number == kill_at:
                    raise KeyboardInterrupt
                yield step

        train(model, until_killed, [], RECIPE, folder)
        return model

    whole = adapted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        adapted(tmp_path / "killed", kill_at=9)
    torch.rand(5)  # whatever chance has come to elsewhere
    assert_same_weights(adapted(tmp_path / "killed"), whole)
    kept = torch.load(tmp_path / "whole" / "training.pt", weights_only=True)
    assert kept["model"].keys() == {n for n, w in whole.named_parameters() if w.requires_grad}


def test_a_finished_run_is_not_trained_again(tmp_path):
    trained, curve = run(tmp_path)
    again, same = run(tmp_path, until=0)
    assert same == curve
    assert_same_weights(again, trained)


def test_a_run_is_not_resumed_with_another_recipe_or_other_weights(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"training.pt is of a run with peak_rate '0.003'; take"):
        run(tmp_path, peak_rate=1e-4)
    model = fresh_model()
    add_lora(model)
    with pytest.raises(ValueError, match="not of what is trained here"):
        train(model, counting(), UNSEEN, RECIPE, tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02N.", None])
def test_a_file_that_is_no_checkpoint_of_a_run_is_named(tmp_path, content):
    if content is None:
        torch.save({"weights": torch.ones(3)}, tmp_path / "training.pt")
    else:
        (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"training.pt: not the checkpoint of a run; delete it"):
        run(tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_what_was_kept(tmp_path):
    steps = counting()

    def until_broken(first: int) -> Iterator[Step]:
        for number, step in enumerate(steps(first), start=first):
            if number == 6:
                model.norm.weight.data.fill_(math.nan)
            yield step

    model = fresh_model()
    with pytest.raises(FloatingPointError, match="the loss is nan by now"):
        train(model, until_broken, UNSEEN, RECIPE, tmp_path)
    kept = torch.load(tmp_path / "training.pt", weights_only=True)
    assert kept["step"] == 4
    assert all(weight.isfinite().all() for weight in kept["model"].values())


def test_the_loss_is_the_mean_over_the_targets_of_a_step_however_it_is_cut(tmp_path):
    """The same weights after some steps, whether four rows go through at once or one by one."""
    recipe = replace(RECIPE, autocast=None)
    models = []
    for at_once in (4, 1):
        models.append(fresh_model())
        steps = packed(DIALOGS, context=16, batch=4, at_once=at_once)
        counts = [batch.num_targets for batch in next(steps(0))]
        assert len(counts) == 4 // at_once
        assert at_once > 1 or len(set(counts)) > 1  # so a mean of means would be another
        train(models[-1], steps, [], recipe, tmp_path / str(at_once))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_documents_that_are_packed_are_learned_from_as_if_each_were_alone():
    model = fresh_model()
    alone = sum(summed_loss(model, together([example])) for example in DIALOGS)
    alone.backward()
    expected = gradients(model)
    loss = summed_loss(model, together(DIALOGS))
    loss.backward()
    torch.testing.assert_close(loss, alone)
    for ours, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_no_document_sees_another():
    """To the last bit: what stands before it in a row changes nothing of its logits."""
    model = fresh_model()
    with capture(model, "logits") as seen:
        summed_loss(model, together(DIALOGS[:3]))
        before = seen["logits"]
        other = DIALOGS[0]._replace(ids=[7] * len(DIALOGS[0].ids))
        summed_loss(model, together([other, *DIALOGS[1:3]]))
    num_targets = sum(DIALOGS[0].learned)
    assert torch.equal(seen["logits"][num_targets:], before[num_targets:])
    assert not torch.equal(seen["logits"][:num_targets], before[:num_targets])


def test_only_what_is_asked_for_goes_through_the_head():
    model = fresh_model()
    with capture(model, "logits") as seen:
        summed_loss(model, together(DIALOGS))
    assert len(seen["logits"]) == sum(sum(example.learned) for example in DIALOGS)


def test_the_loss_of_rows_is_the_mean_over_their_tokens():
    model = fresh_model()
    rows = torch.randint(100, (3, 9))
    with torch.no_grad():
        logprobs = model(rows[:, :-1]).log_softmax(-1)
        expected = -logprobs.gather(-1, rows[:, 1:, None]).mean()
        torch.testing.assert_close(next_token_loss(model, rows), expected)


def test_recomputed_layers_give_the_same_gradients_and_keep_less(tmp_path):
    kept = []
    for recompute in (False, True):
        model = fresh_model()
        saved = set()

        def put_down(x: torch.Tensor, saved: set = saved) -> torch.Tensor:
            saved.add((x.data_ptr(), x.nbytes))
            return x

        recipe = replace(RECIPE, steps=2, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(put_down, lambda x: x):
            train(model, counting(), [], recipe, tmp_path / str(recompute))
        assert all("forward" not in vars(layer) for layer in model.layers)
        kept.append((model, sum(nbytes for _, nbytes in saved)))
    (plain, all_of_it), (recomputed, less) = kept
    assert_same_weights(recomputed, plain)
    assert less < all_of_it / 2


def test_the_whole_gradient_is_clipped_to_the_norm_of_the_recipe(tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        clip(parameters, max_norm)
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in parameters]).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(fresh_model(), counting(), [], replace(RECIPE, clip=0.01), tmp_path)
    assert norms == pytest.approx([0.01] * RECIPE.steps, rel=1e-3)


def test_matrices_decay_and_norms_and_embeddings_do_not(tmp_path):
    """At a rate of nothing but decay: a gradient clipped to zero moves no weight by itself."""
    model = fresh_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    recipe = replace(RECIPE, clip=0.0, warmup=1, weight_decay=0.5, steps=2)
    train(model, counting(), [], recipe, tmp_path)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or name == "embed.weight":
            assert torch.equal(weight, before[name]), name
        else:
            assert weight.norm() < before[name].norm(), name


def test_weights_in_16_bits_are_not_trained():
    with pytest.raises(ValueError, match=r"embed.weight is in torch.bfloat16.*float32, or train"):
        train(fresh_model().bfloat16(), counting(), [], RECIPE, Path())
    with pytest.raises(ValueError, match="no weight requires a gradient"):
        train(fresh_model().requires_grad_(False), counting(), [], RECIPE, Path())
