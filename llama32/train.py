"""A training loop to read in one sitting: packed rows, AdamW, a cosine, and a safe resume.

The loop owns no data and no model: it is given a `Llama` and, for each epoch, one long row of
token ids (`pack`), so what to train on and how to vary it stays with the caller.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from llama32.model import Llama

IGNORED = -100  # a target that nothing is learned from


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. The defaults suit a model of a few million parameters."""

    steps: int
    batch: int = 8  # rows per step
    context: int = 1024  # tokens per row
    peak_rate: float = 3e-3
    warmup: int = 200  # steps
    final_rate: float = 0.05  # of the peak
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # on matrices; norms and embeddings are left alone
    clip: float = 1.0  # norm of the whole gradient
    seed: int = 0
    save_every: int = 300  # steps between held-out loss, and a checkpoint to resume from


def initialize(model: Llama, seed: int = 0) -> None:
    """Normal weights of deviation 0.02; what writes to the residual stream is scaled down by
    sqrt(2L), so that the stream keeps its size through the layers. (GPT-2, section 2.3)"""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # a norm starts as the identity
            nn.init.ones_(weight)
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * len(model.layers)) if writes else 0.02
        nn.init.normal_(weight, std=deviation, generator=draw)


def pack(documents: Sequence[Sequence[int]], seed: int) -> Int[Tensor, " N"]:
    """Documents in shuffled order, end to end: no padding, every token is trained on."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return torch.tensor([token for i in order for token in documents[i]])


def next_token_loss(
    model: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of each token given those before it.

    `targets` are what each position should predict, `IGNORED` where nothing is asked. By default
    they are the tokens themselves, one to the left.
    """
    if targets is None:
        tokens, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)


def train(
    model: Llama,
    epochs: Callable[[int], Int[Tensor, " N"]],
    held_out: Int[Tensor, " M"],
    recipe: Recipe,
    folder: Path,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> list[tuple[int, float, float]]:
    """Train in place, from the newest checkpoint in `folder` if it holds one.

    `epochs(i)` gives the tokens of epoch i. A batch depends on (recipe, step) alone, so a run
    that was killed and resumed ends as one that was not. `forward` stands in for the model where
    it is a faster form of the same weights. Returns (step, train loss, held-out loss) for every
    checkpoint, nats per token.
    """
    optimizer = torch.optim.AdamW(_decayed(model, recipe), lr=recipe.peak_rate, betas=recipe.betas)
    step, history = _resume(folder / "training.pt", model, optimizer)
    forward = model if forward is None else forward
    batches = _batches(epochs, recipe, step)
    device = model.embed.weight.device
    with _progress() as progress:
        task = progress.add_task("", total=recipe.steps, completed=step)
        recent = []
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            with torch.autocast(device.type, torch.bfloat16):
                loss = next_token_loss(forward, next(batches).to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            recent.append(loss.detach())
            if step % recipe.save_every == 0 or step == recipe.steps:
                rows = held_out.to(device)
                losses = torch.stack(recent).mean().item(), held_out_loss(forward, rows, recipe)
                history.append((step, *losses))
                recent.clear()
                _save(folder / "training.pt", model, optimizer, step, history)
                said = f"train {losses[0]:.4f}  held out {losses[1]:.4f} nats/token"
                progress.console.print(f"step {step}  {said}")
                progress.update(task, description=said)
            progress.update(task, completed=step)
    return history


@torch.no_grad()
def held_out_loss(
    model: Callable[[Tensor], Tensor], tokens: Int[Tensor, " M"], recipe: Recipe
) -> float:
    """Mean loss over rows that are never trained on, nats per token."""
    rows = _rows(tokens, recipe.context, offset=0).split(recipe.batch)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        losses = [next_token_loss(model, row) * len(row) for row in rows]
    return (torch.stack(losses).sum() / sum(map(len, rows))).item()


def learning_rate(step: int, recipe: Recipe) -> float:
    """A line up to the peak, then half a cosine down to `final_rate` of it."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    low = recipe.final_rate
    return recipe.peak_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


def _batches(
    epochs: Callable[[int], Tensor], recipe: Recipe, step: int
) -> Iterator[Int[Tensor, "B T1"]]:
    """Batches from `step` on. Each epoch is cut into rows at another offset and shuffled."""
    epoch, first = 0, 0
    while True:
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        offset = int(torch.randint(recipe.context, (), generator=draw))
        rows = _rows(epochs(epoch), recipe.context, offset)
        rows = rows[torch.randperm(len(rows), generator=draw)]
        whole = len(rows) // recipe.batch
        for i in range(max(0, step - first), whole):
            yield rows[i * recipe.batch : (i + 1) * recipe.batch]
        epoch, first = epoch + 1, first + whole


def _rows(tokens: Tensor, context: int, offset: int) -> Int[Tensor, "rows T1"]:
    """Rows of context + 1 tokens that overlap by one: the last target is the next row's start."""
    if len(tokens) < offset + context + 1:
        raise ValueError(f"training: {len(tokens)} tokens do not fill a row of {context} + 1")
    return tokens[offset:].unfold(0, context + 1, context)


def _decayed(model: nn.Module, recipe: Recipe) -> list[dict]:
    matrices = [w for n, w in model.named_parameters() if w.ndim > 1 and "embed" not in n]
    others = [w for n, w in model.named_parameters() if w.ndim == 1 or "embed" in n]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, history: list
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")  # a kill while writing leaves the last one whole
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step, "history": history}, aside)
    aside.replace(path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list]:
    if not path.exists():
        return 0, []
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["history"]


def _progress() -> Progress:
    columns = MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.description}"))
