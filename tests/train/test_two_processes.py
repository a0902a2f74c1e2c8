"""Training in two processes gives the same result as in one."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from llama32 import add_lora
from llama32.parallel.fsdp import shard
from llama32.train.config import TrainConfig
from llama32.train.data import packed_batches
from llama32.train.loop import train
from tests.processes import in_processes
from tests.train.test_loop import DIALOGS, UNSEEN, fresh_model

CONFIG = TrainConfig(steps=8, warmup=2, save_every=4, autocast=None)


def learn(mesh: DeviceMesh | None, folder: Path, until: int = 8, batch: int = 4) -> list:
    """Train an adapter with dropout up to step `until`, and return the learning curve."""
    model = fresh_model()
    add_lora(model, rank=2, dropout=0.2)
    if mesh is not None:
        shard(model, mesh)
    steps = packed_batches(DIALOGS, context=32, batch=batch)
    curve = train(
        model, lambda first: islice(steps(first), until - first), UNSEEN, CONFIG, folder, mesh=mesh
    )
    return [tuple(point) for point in curve]


def learn_twice(mesh: DeviceMesh, folder: Path) -> list:
    """Train from the beginning, and resume a run that a single process started."""
    return [learn(mesh, folder / "whole"), learn(mesh, folder / "begun")]


def learn_unevenly(mesh: DeviceMesh, folder: Path) -> str:
    """Return the error for a step that the processes cannot share."""
    with pytest.raises(ValueError, match="training") as error:
        learn(mesh, folder, batch=3)
    return str(error.value)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "training.pt", weights_only=True)["model"]


def test_two_processes_learn_the_same_as_one_also_when_resuming_its_run(tmp_path):
    expected = learn(None, tmp_path / "one")
    learn(None, tmp_path / "begun", until=4)
    shutil.copytree(tmp_path / "begun", tmp_path / "two" / "begun")
    first, second = in_processes(2, learn_twice, tmp_path / "two", tmp_path / "two")
    assert first == second
    for curve in first:
        assert len(curve) == len(expected) == 3
        for point, expected_point in zip(curve, expected, strict=True):
            torch.testing.assert_close(point[1:], expected_point[1:])
    for run in ("whole", "begun"):
        ours, reference = saved_weights(tmp_path / "two" / run), saved_weights(tmp_path / "one")
        assert ours.keys() == reference.keys()
        for name, weight in reference.items():
            torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5)


def test_a_step_that_cannot_be_shared_evenly_is_refused(tmp_path):
    first, second = in_processes(2, learn_unevenly, tmp_path, tmp_path)
    assert first == second
    assert "3 microbatches a step, which 2 processes cannot share" in first
