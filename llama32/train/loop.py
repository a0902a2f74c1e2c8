"""A training loop to read in one sitting: AdamW, a cosine, accumulated gradients, a safe resume.

The loop owns no data and no model. It is given a `Llama`, of which it trains what requires
gradients (all of it, or an adapter inside), and the steps to go through (`data.py`).
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llama32.adapt.sharded import gather, scatter
from llama32.model import Llama
from llama32.train.data import IGNORED, Data, Microbatch, Step, predicting
from llama32.train.documents import Documents
from llama32.train.recipe import Recipe, groups, learning_rate, trainable

# What `torch.load` raises, and reading what it gives, where a file is none of ours.
UNREADABLE = (RuntimeError, UnpicklingError, EOFError, AttributeError, LookupError)
Forward = Callable[..., Tensor]  # a Llama, or a faster form of the same weights


class Point(NamedTuple):
    """Of the learning curve. Losses in nats per token: the mean since the point before, and over
    what is held out; None where there is none."""

    step: int
    train: float | None
    held_out: float | None


def summed_loss(model: Forward, batch: Microbatch) -> Float[Tensor, ""]:
    """Cross-entropy in nats, summed over the targets. Only what is asked goes through the head."""
    if batch.lengths is None:
        logits, targets = model(batch.tokens).flatten(0, -2), batch.targets.flatten()
    else:
        asked = batch.targets != IGNORED
        logits = model(batch.tokens, batch.positions, attend=Documents(batch.lengths), rows=asked)
        targets = batch.targets[asked]
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def next_token_loss(model: Forward, tokens: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of each token given those before it."""
    batch = predicting(tokens)
    return summed_loss(model, batch) / batch.num_targets


def train(
    model: Llama,
    data: Data,
    held_out: Sequence[Microbatch],
    recipe: Recipe,
    folder: Path,
    *,
    forward: Forward | None = None,
    mesh: DeviceMesh | None = None,
) -> list[Point]:
    """Train in place, from the newest checkpoint in `folder` if it holds one.

    A run that was killed and resumed ends, bit by bit, as one that was not. `forward` stands in
    for the model where it is a faster form of the same weights. `mesh` is that of a model sharded
    over several processes (`adapt/sharded.py`), each of which takes its part of a step's
    microbatches. Returns the learning curve, which begins with the held-out loss of the model as
    it came.
    """
    run = Run(model, recipe, folder / "training.pt", forward or model, mesh)
    run.resume()
    left = recipe.steps - run.num_steps
    with recomputing(model, recipe.recompute), bar(recipe.steps, run.rank == 0) as show:
        if not run.curve:
            run.mark(held_out)
        show(run.num_steps, run.curve)
        for step in islice(data(run.num_steps), left):
            run.take(step)
            if run.num_steps % recipe.save_every == 0 or run.num_steps == recipe.steps:
                run.mark(held_out)
                run.keep()
            show(run.num_steps, run.curve)
    model.eval()
    return run.curve


class Run:
    """A model on its way: what of it is trained, the optimizer, how far it has come."""

    def __init__(
        self, model: Llama, recipe: Recipe, file: Path, forward: Forward, mesh: DeviceMesh | None
    ) -> None:
        self.model, self.recipe, self.file, self.forward = model, recipe, file, forward
        self.rank, self.world, self.group = 0, 1, None
        if mesh is not None:
            self.rank, self.world, self.group = mesh.get_rank(), mesh.size(), mesh.get_group()
        self.weights = trainable(model)
        self.optimizer = torch.optim.AdamW(groups(self.weights, recipe), betas=recipe.betas)
        self.device = model.embed.weight.device
        self.num_steps = 0
        self.curve: list[Point] = []
        self.losses: list[Tensor] = []  # since the last point

    def take(self, step: Step) -> None:
        """One step of the optimizer. The loss is a mean over all targets of the step, in however
        many microbatches they come and whichever process has them."""
        if len(step) % self.world:  # the processes of a sharded model must run it equally often
            advice = f"{len(step)} microbatches a step, which {self.world} processes cannot share"
            raise ValueError(f"training: {advice}")
        num_targets = sum(batch.num_targets for batch in step)
        mean = torch.zeros((), device=self.device)
        self.model.train()
        for i in range(self.rank, len(step), self.world):
            with seeded(f"{self.recipe.seed} {self.num_steps} {i}", self.device):
                loss = self.loss(step[i]) / num_targets
                loss.backward()  # a sharded model adds up the gradients of all processes
                mean += loss.detach()
        nn.utils.clip_grad_norm_(self.weights.values(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.num_steps, self.recipe)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(mean)
        self.num_steps += 1

    def loss(self, batch: Microbatch) -> Float[Tensor, ""]:
        """Summed over the targets."""
        lower = self.recipe.autocast
        with torch.autocast(self.device.type, lower, enabled=lower is not None):
            return summed_loss(self.forward, batch.to(self.device))

    @torch.no_grad()
    def mark(self, held_out: Sequence[Microbatch]) -> None:
        """A point of the curve."""
        self.model.eval()
        seen = unseen = None
        if held_out:
            total = sum(self.loss(batch).item() for batch in held_out)
            unseen = total / sum(batch.num_targets for batch in held_out)
        if self.losses:
            mean = torch.stack(self.losses).mean()
            if self.group is not None:
                distributed.all_reduce(mean, group=self.group)
            seen = mean.item()
            if not math.isfinite(seen):  # and the file keeps what was before
                advice = "a lower peak_rate, or a longer warmup, may help"
                raise FloatingPointError(f"training: the loss is {seen} by now; {advice}")
        self.curve.append(Point(self.num_steps, seen, unseen))
        self.losses.clear()

    def keep(self) -> None:
        """Put into the file what a resumed run needs."""
        state = gather(self.model, self.optimizer)
        if self.rank:
            return
        told = {
            "recipe": said(self.recipe),
            "step": self.num_steps,
            "curve": [tuple(point) for point in self.curve],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".writing")  # a kill while writing leaves the last one whole
        torch.save(told | state, aside)
        aside.replace(self.file)

    def resume(self) -> None:
        """Go on from the file, if there is one; ValueError where it is of another run."""
        saved: dict[str, Any] = {"model": {}, "optimizer": {}}
        if self.rank == 0 and self.file.exists():
            saved = read(self.file)
        told = [{key: saved[key] for key in ("recipe", "step", "curve") if key in saved}]
        if self.group is not None:  # which of the processes has the file need not matter
            distributed.broadcast_object_list(told, group_src=0, group=self.group)
        (told,) = told
        if not told:
            return
        now = said(self.recipe)
        other = [f"{key} {was!r}" for key, was in told["recipe"].items() if was != now.get(key)]
        if other:
            advice = "take another folder, or go on as it began"
            raise ValueError(f"{self.file} is of a run with {', '.join(other)}; {advice}")
        scatter(self.model, self.optimizer, {key: saved[key] for key in ("model", "optimizer")})
        self.num_steps = told["step"]
        self.curve = [Point(*point) for point in told["curve"]]


def read(file: Path) -> dict[str, Any]:
    """What `keep` has written; ValueError where a file holds something else."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        complete = {"recipe", "step", "curve", "model", "optimizer"} <= saved.keys()
    except UNREADABLE:
        complete = False
    if not complete:
        raise ValueError(f"{file}: not the checkpoint of a run; delete it to begin anew")
    return saved


@contextmanager
def seeded(seed: str, device: torch.device) -> Iterator[None]:
    """Chance (dropout) that depends on the seed alone, and leaves no trace outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        yield


@contextmanager
def recomputing(model: Llama, wanted: bool = True) -> Iterator[None]:
    """Keep what enters each layer alone, and run the layer again in the backward pass: so the
    memory for activations is that of one layer. (Chen et al. 2016)"""
    if not wanted:
        yield
        return
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward


def said(recipe: Recipe) -> dict[str, Any]:
    """As a file can hold it."""
    return {name: str(value) for name, value in asdict(recipe).items()}


@contextmanager
def bar(total: int, shown: bool) -> Iterator[Callable[[int, list[Point]], None]]:
    """Shows on stderr how far a run is, and each point of its curve."""
    if not shown:
        yield lambda step, curve: None
        return
    losses = TextColumn("{task.description} nats/token")
    columns = MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), losses
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def show(step: int, curve: list[Point]) -> None:
            losses = ("train", curve[-1].train), ("held out", curve[-1].held_out)
            text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
            if curve[-1].step == step:
                console.print(f"step {step}: {text or 'nothing measured'}")
            progress.update(task, completed=step, description=text)

        yield show
