"""The training loop: AdamW, cosine schedule, gradient accumulation, safe resume.

The loop owns neither model nor data. The caller passes a `Llama`, whose parameters that require
gradients are trained (all of them, or an adapter's), and a source of batches (`data.py`).
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llama32.model import Llama
from llama32.parallel.fsdp import gather, scatter
from llama32.train.checkpoint import read_checkpoint
from llama32.train.config import TrainConfig, learning_rate, parameter_groups, trainable_parameters
from llama32.train.data import IGNORE_INDEX, BatchSource, GlobalBatch, Microbatch, shift
from llama32.train.document_attention import DocumentAttention

Forward = Callable[..., Tensor]  # a Llama, or a faster function of the same weights


class CurvePoint(NamedTuple):
    """A point of the learning curve, with losses in nats per token."""

    step: int
    train: float | None  # mean since the previous point; None at the first point
    held_out: float | None  # None without held-out data


def summed_loss(model: Forward, batch: Microbatch) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats, summed over the targets.

    For packed documents, only tokens with a target pass through the output head.
    """
    if batch.lengths is None:
        logits, targets = model(batch.tokens).flatten(0, -2), batch.targets.flatten()
    else:
        is_target = batch.targets != IGNORE_INDEX
        attend = DocumentAttention(batch.lengths)
        logits = model(batch.tokens, batch.positions, attend=attend, logits_at=is_target)
        targets = batch.targets[is_target]
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def next_token_loss(model: Forward, tokens: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy in nats of each token given all earlier tokens."""
    batch = shift(tokens)
    return summed_loss(model, batch) / batch.num_targets


def train(
    model: Llama,
    data: BatchSource,
    held_out: Sequence[Microbatch],
    config: TrainConfig,
    folder: Path,
    *,
    forward: Forward | None = None,
    mesh: DeviceMesh | None = None,
) -> list[CurvePoint]:
    """Train in place, continuing from the checkpoint in `folder` if present.

    A killed and resumed run ends with the same bits as an uninterrupted run. `forward` replaces the
    model by a faster function of the same weights. `mesh` is the mesh of a model sharded over
    several processes (`parallel/fsdp.py`); each process takes a part of a step's micro-batches.
    Returns the learning curve, which begins with the held-out loss before training.
    """
    state = TrainState(model, config, folder / "training.pt", forward or model, mesh)
    state.resume()
    steps_left = config.steps - state.num_steps
    with (
        activation_checkpointing(model, config.activation_checkpointing),
        progress_bar(config.steps, state.rank == 0) as show,
    ):
        if not state.curve:
            state.record_losses(held_out)
        show(state.num_steps, state.curve)
        for batch in islice(data(state.num_steps), steps_left):
            state.train_step(batch)
            if state.num_steps % config.save_every == 0 or state.num_steps == config.steps:
                state.record_losses(held_out)
                state.save_checkpoint()
            show(state.num_steps, state.curve)
    model.eval()
    return state.curve


class TrainState:
    """Model, optimizer and progress of a training run."""

    def __init__(
        self,
        model: Llama,
        config: TrainConfig,
        file: Path,
        forward: Forward,
        mesh: DeviceMesh | None,
    ) -> None:
        self.model, self.config, self.file, self.forward = model, config, file, forward
        self.rank, self.world, self.group = 0, 1, None
        if mesh is not None:
            self.rank, self.world, self.group = mesh.get_rank(), mesh.size(), mesh.get_group()
        self.weights = trainable_parameters(model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.weights, config), betas=config.betas
        )
        self.device = model.embed.weight.device
        self.num_steps = 0
        self.curve: list[CurvePoint] = []
        self.losses: list[Tensor] = []  # one per step since the last point

    def train_step(self, batch: GlobalBatch) -> None:
        """Take a step of the optimizer.

        The loss is the mean over all targets of the step, however they are divided into
        micro-batches and processes. Raises ValueError if the processes cannot share the
        micro-batches evenly.
        """
        if len(batch) % self.world:  # each process must run the model the same number of times
            advice = f"{len(batch)} microbatches a step, which {self.world} processes cannot share"
            raise ValueError(f"training: {advice}")
        num_targets = sum(microbatch.num_targets for microbatch in batch)
        mean = torch.zeros((), device=self.device)
        self.model.train()
        for i in range(self.rank, len(batch), self.world):
            with fork_seed(f"{self.config.seed} {self.num_steps} {i}", self.device):
                loss = self.loss(batch[i]) / num_targets
                loss.backward()  # a sharded model adds up the gradients of all processes
                mean += loss.detach()
        nn.utils.clip_grad_norm_(self.weights.values(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.num_steps, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(mean)
        self.num_steps += 1

    def loss(self, batch: Microbatch) -> Float[Tensor, ""]:
        """Return the loss summed over the targets, in the precision of `autocast`."""
        dtype = self.config.autocast
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return summed_loss(self.forward, batch.to(self.device))

    @torch.no_grad()
    def record_losses(self, held_out: Sequence[Microbatch]) -> None:
        """Add a point to the curve. Raises FloatingPointError if the loss is not finite."""
        self.model.eval()
        train_loss = held_out_loss = None
        if held_out:
            total = sum(self.loss(microbatch).item() for microbatch in held_out)
            held_out_loss = total / sum(microbatch.num_targets for microbatch in held_out)
        if self.losses:
            mean = torch.stack(self.losses).mean()
            if self.group is not None:
                distributed.all_reduce(mean, group=self.group)
            train_loss = mean.item()
            if not math.isfinite(train_loss):  # raise before saving: the last checkpoint stays
                advice = "a lower peak_rate, or a longer warmup, may help"
                raise FloatingPointError(f"training: the loss is {train_loss}; {advice}")
        self.curve.append(CurvePoint(self.num_steps, train_loss, held_out_loss))
        self.losses.clear()

    def save_checkpoint(self) -> None:
        """Write everything that a resumed run needs."""
        state = gather(self.model, self.optimizer)
        if self.rank:
            return
        progress = {
            "config": config_dict(self.config),
            "step": self.num_steps,
            "curve": [tuple(point) for point in self.curve],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".writing")  # a kill here keeps the last checkpoint
        torch.save(progress | state, temporary)
        temporary.replace(self.file)

    def resume(self) -> None:
        """Continue from the file, if present. Raises ValueError if the settings have changed."""
        saved: dict[str, Any] = {"model": {}, "optimizer": {}}
        if self.rank == 0 and self.file.exists():
            saved = read_checkpoint(self.file)
        shared = [{key: saved[key] for key in ("config", "step", "curve") if key in saved}]
        if self.group is not None:  # so only rank 0 needs access to the file
            distributed.broadcast_object_list(shared, group_src=0, group=self.group)
        (progress,) = shared
        if not progress:
            return
        now, before = config_dict(self.config), progress["config"]
        changed = [f"{key} {value!r}" for key, value in before.items() if value != now.get(key)]
        if changed:
            advice = "take another folder, or the same settings as before"
            raise ValueError(f"{self.file} is of a run with {', '.join(changed)}; {advice}")
        scatter(self.model, self.optimizer, {key: saved[key] for key in ("model", "optimizer")})
        self.num_steps = progress["step"]
        self.curve = [CurvePoint(*point) for point in progress["curve"]]


@contextmanager
def fork_seed(seed: str, device: torch.device) -> Iterator[None]:
    """Make dropout depend on the seed alone, and restore the random state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        yield


@contextmanager
def activation_checkpointing(model: Llama, enabled: bool = True) -> Iterator[None]:
    """Keep only the input of each layer, and run the layer again in the backward pass.

    The other activations then take the memory of a single layer. (Chen et al. 2016)
    """
    if not enabled:
        yield
        return
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the config as strings, to be stored and compared."""
    return {name: str(value) for name, value in asdict(config).items()}


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int, list[CurvePoint]], None]]:
    """Show progress and each point of the curve on stderr. Yields the update function."""
    if not shown:
        yield lambda step, curve: None
        return
    losses = TextColumn("{task.description} nats/token")
    columns = MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), losses
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def show(step: int, curve: list[CurvePoint]) -> None:
            losses = ("train", curve[-1].train), ("held out", curve[-1].held_out)
            text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
            if curve[-1].step == step:
                console.print(f"step {step}: {text or 'nothing measured'}")
            progress.update(task, completed=step, description=text)

        yield show
