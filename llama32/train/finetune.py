"""Fine-tuning: records in, a trained model and a learning curve out."""

import logging
import random
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch.distributed.device_mesh import DeviceMesh

from llama32.llm.llm import LLM
from llama32.train.config import TrainConfig
from llama32.train.data import Example, collate, num_steps, pack_rows, packed_batches
from llama32.train.examples import DEFAULT_DATE, Examples, Record, read_records, to_examples
from llama32.train.loop import CurvePoint, train
from llama32.train.plot import draw_curve

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def accepts_old_keywords(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function accept old keyword names (old="new") with a DeprecationWarning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in renamed.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(
                        f"{function.__name__}: {old} is the old name of {new}; give one"
                    )
                warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


@accepts_old_keywords(at_once="micro_batch", recompute="activation_checkpointing")
def finetune(
    llm: LLM,
    records: str | Path | Sequence[Record],
    folder: str | Path,
    *,
    held_out: str | Path | Sequence[Record] | float = 0.05,
    epochs: int = 3,
    batch: int = 8,
    micro_batch: int = 1,
    context: int | None = None,
    date: str = DEFAULT_DATE,
    mesh: DeviceMesh | None = None,
    **config: Any,
) -> list[CurvePoint]:
    """Train the parameters of `llm.model` that require gradients (an adapter, after `add_lora`).

    `records` are dialogs, prompts with completions, or texts (`examples.py`), or a file with a
    record per line. Whole examples are packed into rows of up to `context` tokens, by default the
    model's context and at most 2,048; longer examples lose their end. A step is `batch` rows, and
    `micro_batch` rows at a time pass through the model. `held_out` is measured for the curve and
    never learned: other records, or a share of `records`. `date` is the date in dialogs. `mesh` is
    the mesh of a model sharded over several processes (`parallel/fsdp.py`). All other keywords go
    to `TrainConfig`.

    Writes `training.pt`, from which a killed run resumes, and `curve.png` to `folder`. Returns the
    learning curve.
    """
    folder = Path(folder)
    context = check_context(context, llm)
    seed = config.setdefault("seed", 0)
    loaded = load_examples(llm, records, context, date)
    if isinstance(held_out, float | int):
        examples, unseen = split_held_out(loaded.examples, held_out, seed)
    else:
        examples, unseen = loaded.examples, load_examples(llm, held_out, context, date).examples
    if not examples:
        raise ValueError("finetune: there is nothing to learn in these records")
    steps = num_steps(examples, context, batch, epochs, seed)
    defaults: dict[str, Any] = {"warmup": -(-steps // 20), "save_every": max(1, steps // 20)}
    defaults["data"] = fingerprint(examples, context, batch, micro_batch)
    settings = TrainConfig(**{"steps": steps, **defaults, **config})
    logger.info("%s", summarize(examples, settings.steps) + truncation_note(loaded, context))
    data = packed_batches(examples, context, batch, micro_batch, seed)
    rows = [collate(row) for row in pack_rows(unseen, context, seed=0, epoch=0)]
    curve = train(llm.model, data, rows, settings, folder, mesh=mesh)
    if mesh is None or mesh.get_rank() == 0:
        title = f"{len(examples):,} examples, {epochs} epochs"
        draw_curve(curve, folder / "curve.png", title)
    return curve


def fingerprint(examples: Sequence[Example], context: int, batch: int, micro_batch: int) -> str:
    """Return a digest of the training data and of how rows are batched.

    A run resumes only with the same digest. Checkpoints of version 0.1.0 hold the digest of
    `repr((examples, context, batch, micro_batch))` from a time when the field `loss_mask` was
    named `learned`, so the hashed text keeps that name.
    """
    documents = ", ".join(f"Example(ids={ids!r}, learned={mask!r})" for ids, mask in examples)
    text = f"([{documents}], {context!r}, {batch!r}, {micro_batch!r})"
    return sha256(text.encode()).hexdigest()


def check_context(context: int | None, llm: LLM) -> int:
    """Return the context or the default. Raises ValueError above the model's limit."""
    limit = llm.model.config.max_position_embeddings
    if context is None:
        return min(limit, 2048)
    if not 1 <= context <= limit:
        raise ValueError(f"context is {context}, allowed: 1 to the model's {limit}")
    return context


def load_examples(
    llm: LLM, records: str | Path | Sequence[Record], context: int, date: str
) -> Examples:
    """Encode records, read from a file if `records` is a path."""
    if isinstance(records, str | Path):
        records = read_records(Path(records))
    return to_examples(records, llm.require_tokenizer(), llm.chat_format, context, date)


def split_held_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split off a random share of examples. Both parts keep the order of `examples`."""
    if not 0 <= share < 1:
        raise ValueError(f"held_out is {share}, allowed: from 0 up to below 1")
    indices = {*random.Random(seed).sample(range(len(examples)), round(share * len(examples)))}
    training = [example for i, example in enumerate(examples) if i not in indices]
    return training, [example for i, example in enumerate(examples) if i in indices]


def summarize(examples: Sequence[Example], steps: int) -> str:
    """Return a line with the numbers of examples, tokens and steps."""
    tokens = sum(len(example.ids) for example in examples)
    num_loss_tokens = sum(sum(example.loss_mask) for example in examples)
    share = f"{num_loss_tokens / tokens:.0%} of them with a loss"
    return f"{len(examples):,} examples, {tokens:,} tokens, {share}; {steps:,} steps"


def truncation_note(loaded: Examples, context: int) -> str:
    """Return how many examples exceeded the context; empty without any."""
    note = ""
    if loaded.num_truncated:
        note += f"; {loaded.num_truncated:,} examples are cut to {context:,} tokens"
    if loaded.num_dropped:
        note += f"; {loaded.num_dropped:,} are left out, because the cut leaves nothing to learn"
    return note
