import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama32 import Llama, add_lora, capture
from llama32.train.config import TrainConfig, initialize
from llama32.train.data import (
    Example,
    GlobalBatch,
    collate,
    packed_batches,
    shift,
    split_rows,
    text_batches,
)
from llama32.train.loop import next_token_loss, summed_loss, train
from tests.checkpoints import random_model, tiny_config

CONFIG = TrainConfig(steps=12, warmup=2, save_every=4)
COUNTING = torch.arange(1000) % 100
UNSEEN = [shift(rows) for rows in split_rows(COUNTING[:100], 16).split(2)]
DIALOGS = [
    Example([*range(i, i + 3 + i % 7)], [False, False, *[True] * (1 + i % 7)]) for i in range(1, 30)
]


def fresh_model() -> Llama:
    model = random_model(tiny_config(vocab_size=100))
    initialize(model, seed=1)
    return model


def counting(until: int | None = None):
    """Batches of short epochs, so a run spans several; `until` is the last epoch before a kill."""
    epochs = []

    def epoch(number: int) -> torch.Tensor:
        epochs.append(number)
        if until is not None and len(epochs) > until:
            raise KeyboardInterrupt
        return COUNTING[:120]

    return text_batches(epoch, context=16, batch=2)


def run(folder: Path, until: int | None = None, **changes):
    model = fresh_model()
    curve = train(model, counting(until), UNSEEN, replace(CONFIG, **changes), folder)
    return model, curve


def assert_same_weights(ours: Llama, expected: Llama) -> None:
    for weight, expected_weight in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, expected_weight)


def gradients(model: Llama) -> list[torch.Tensor]:
    grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return grads


def test_training_lowers_both_losses(tmp_path):
    _, curve = run(tmp_path, steps=60)
    assert [point.step for point in curve] == list(range(0, 61, 4))
    assert curve[0].train is None
    assert curve[0].held_out == pytest.approx(math.log(100), abs=0.1)
    _, train_losses, held_out_losses = zip(*curve[1:], strict=True)
    assert train_losses[-1] < 0.6 * train_losses[0]
    assert held_out_losses[-1] < 0.6 * held_out_losses[0]


def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_run(tmp_path):
    whole, curve = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", until=3)
    assert (tmp_path / "killed" / "training.pt").exists()
    resumed, resumed_curve = run(tmp_path / "killed")
    assert resumed_curve == curve
    assert_same_weights(resumed, whole)


def train_adapter(folder: Path, kill_at: int | None = None) -> Llama:
    """Train an adapter with dropout; `kill_at` is the step of an interrupt."""
    model = fresh_model()
    add_lora(model, rank=2, dropout=0.5)
    data = packed_batches(DIALOGS, context=32, batch=2)

    def until_killed(first: int) -> Iterator[GlobalBatch]:
        for step, batch in enumerate(data(first), start=first):
            if step == kill_at:
                raise KeyboardInterrupt
            yield batch

    train(model, until_killed, [], CONFIG, folder)
    return model


def test_an_adapter_with_dropout_resumes_exactly_and_its_base_is_not_saved(tmp_path):
    whole = train_adapter(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tmp_path / "killed", kill_at=9)
    torch.rand(5)  # random numbers drawn elsewhere must not matter
    assert_same_weights(train_adapter(tmp_path / "killed"), whole)
    saved = torch.load(tmp_path / "whole" / "training.pt", weights_only=True)
    assert saved["model"].keys() == {n for n, w in whole.named_parameters() if w.requires_grad}


def old_names(value):
    """The names of version 0.1.0, in dictionary keys and lists at any depth."""
    if isinstance(value, dict):
        return {old_names(key): old_names(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [old_names(entry) for entry in value]
    if isinstance(value, str):
        old = {"config": "recipe", "activation_checkpointing": "recompute"}
        return old.get(value, value.replace(".lora.", ".pair."))
    return value


def test_a_checkpoint_with_the_names_of_version_0_1_0_resumes_bit_by_bit(tmp_path):
    whole = train_adapter(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tmp_path / "killed", kill_at=9)
    file = tmp_path / "killed" / "training.pt"
    saved: Any = old_names(torch.load(file, weights_only=True))
    assert "recompute" in saved["recipe"]
    name = "layers.0.attn.q_proj.pair.a"
    optimizer = saved["optimizer"]
    for names in (saved["model"], optimizer["state"], optimizer["param_groups"][0]["params"]):
        assert name in names
    torch.save(saved, file)
    assert_same_weights(train_adapter(tmp_path / "killed"), whole)
    torch.save(saved, file)
    config = replace(CONFIG, activation_checkpointing=True)
    with pytest.raises(ValueError, match="run with activation_checkpointing 'False'"):
        train(fresh_model(), counting(), [], config, file.parent)


def test_a_finished_run_is_not_trained_again(tmp_path):
    trained, curve = run(tmp_path)
    again, same = run(tmp_path, until=0)
    assert same == curve
    assert_same_weights(again, trained)


def test_a_run_is_not_resumed_with_another_config_or_with_other_weights(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"training.pt is of a run with peak_rate '0.003'; take"):
        run(tmp_path, peak_rate=1e-4)
    model = fresh_model()
    add_lora(model)
    with pytest.raises(ValueError, match="state and model differ in the trained weights"):
        train(model, counting(), UNSEEN, CONFIG, tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02N.", None])
def test_a_file_that_is_not_a_checkpoint_of_a_run_is_named(tmp_path, content):
    if content is None:
        torch.save({"weights": torch.ones(3)}, tmp_path / "training.pt")
    else:
        (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"training.pt: not the checkpoint of a run; delete it"):
        run(tmp_path)


def test_a_nan_loss_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    data = counting()

    def until_broken(first: int) -> Iterator[GlobalBatch]:
        for step, batch in enumerate(data(first), start=first):
            if step == 6:
                model.norm.weight.data.fill_(math.nan)
            yield batch

    model = fresh_model()
    with pytest.raises(FloatingPointError, match="the loss is nan; a lower peak_rate"):
        train(model, until_broken, UNSEEN, CONFIG, tmp_path)
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_the_loss_is_the_mean_over_the_targets_of_a_step_for_any_micro_batch(tmp_path):
    """The same weights after some steps with micro-batches of four rows and of one row."""
    config = replace(CONFIG, autocast=None)
    models = []
    for micro_batch in (4, 1):
        models.append(fresh_model())
        data = packed_batches(DIALOGS, context=16, batch=4, micro_batch=micro_batch)
        counts = [part.num_targets for part in next(data(0))]
        assert len(counts) == 4 // micro_batch
        assert micro_batch > 1 or len(set(counts)) > 1  # a mean of means would differ
        train(models[-1], data, [], config, tmp_path / str(micro_batch))
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, atol=2e-6, rtol=1e-4)


def test_packed_documents_have_the_gradients_of_separate_documents():
    model = fresh_model()
    alone = sum(summed_loss(model, collate([example])) for example in DIALOGS)
    alone.backward()
    expected = gradients(model)
    loss = summed_loss(model, collate(DIALOGS))
    loss.backward()
    torch.testing.assert_close(loss, alone)
    for gradient, expected_gradient in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_no_document_attends_to_another():
    """Bit by bit: earlier documents of a row do not change the logits."""
    model = fresh_model()
    with capture(model, "logits") as seen:
        summed_loss(model, collate(DIALOGS[:3]))
        before = seen["logits"]
        other = DIALOGS[0]._replace(ids=[7] * len(DIALOGS[0].ids))
        summed_loss(model, collate([other, *DIALOGS[1:3]]))
    num_targets = sum(DIALOGS[0].loss_mask)
    assert torch.equal(seen["logits"][num_targets:], before[num_targets:])
    assert not torch.equal(seen["logits"][:num_targets], before[:num_targets])


def test_only_tokens_with_a_target_pass_through_the_head():
    model = fresh_model()
    with capture(model, "logits") as seen:
        summed_loss(model, collate(DIALOGS))
    assert len(seen["logits"]) == sum(sum(example.loss_mask) for example in DIALOGS)


def test_the_loss_of_rows_is_the_mean_over_their_tokens():
    model = fresh_model()
    rows = torch.randint(100, (3, 9))
    with torch.no_grad():
        logprobs = model(rows[:, :-1]).log_softmax(-1)
        expected = -logprobs.gather(-1, rows[:, 1:, None]).mean()
        torch.testing.assert_close(next_token_loss(model, rows), expected)


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less(tmp_path):
    runs = []
    for enabled in (False, True):
        model = fresh_model()
        saved = set()

        def record(x: torch.Tensor, saved: set = saved) -> torch.Tensor:
            saved.add((x.data_ptr(), x.nbytes))
            return x

        config = replace(CONFIG, steps=2, activation_checkpointing=enabled)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            train(model, counting(), [], config, tmp_path / str(enabled))
        assert all("forward" not in vars(layer) for layer in model.layers)
        runs.append((model, sum(nbytes for _, nbytes in saved)))
    (plain, plain_bytes), (recomputed, recomputed_bytes) = runs
    assert_same_weights(recomputed, plain)
    assert recomputed_bytes < plain_bytes / 2


def test_the_whole_gradient_is_clipped_to_the_norm_of_the_config(tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        clip(parameters, max_norm)
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in parameters]).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(fresh_model(), counting(), [], replace(CONFIG, clip=0.01), tmp_path)
    assert norms == pytest.approx([0.01] * CONFIG.steps, rel=1e-3)


def test_matrices_decay_and_norms_and_embeddings_do_not(tmp_path):
    """Decay acts alone here, because the gradient is clipped to zero."""
    model = fresh_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    config = replace(CONFIG, clip=0.0, warmup=1, weight_decay=0.5, steps=2)
    train(model, counting(), [], config, tmp_path)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or name == "embed.weight":
            assert torch.equal(weight, before[name]), name
        else:
            assert weight.norm() < before[name].norm(), name


def test_weights_in_16_bits_are_not_trained():
    with pytest.raises(ValueError, match=r"embed.weight is in torch.bfloat16.*float32, or train"):
        train(fresh_model().bfloat16(), counting(), [], CONFIG, Path())
    with pytest.raises(ValueError, match="no weight requires a gradient"):
        train(fresh_model().requires_grad_(False), counting(), [], CONFIG, Path())
