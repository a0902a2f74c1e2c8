"""Fine-tuning as a whole: records in, a trained model and its learning curve out."""

import logging
import random
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from llama32.llm import LLM
from llama32.train.curve import draw_curve
from llama32.train.data import Example, fill, num_steps, packed, together
from llama32.train.examples import DATE, Examples, Record, read_records, to_examples
from llama32.train.loop import Point, train
from llama32.train.recipe import Recipe

logger = logging.getLogger(__name__)


def finetune(
    llm: LLM,
    records: str | Path | Sequence[Record],
    folder: str | Path,
    *,
    held_out: str | Path | Sequence[Record] | float = 0.05,
    epochs: int = 3,
    batch: int = 8,
    at_once: int = 1,
    context: int | None = None,
    date: str = DATE,
    mesh: DeviceMesh | None = None,
    **recipe: Any,
) -> list[Point]:
    """Train what requires gradients of `llm.model` (an adapter, after `add_lora`) on records, or on
    a file with one in each line: dialogs, prompts with completions, or texts (`examples.py`).

    Whole examples are packed into rows of up to `context` tokens, by default what the model takes
    and 2,048 at most; longer ones lose their end. A step is `batch` rows, `at_once` at a time go
    through the model. `held_out` is what the curve measures and nothing is learned from: other
    records, or a share of these. `date` is what dialogs take for today. `mesh` is that of a model
    sharded over several processes (`adapt/sharded.py`). All else is for `Recipe`.

    `folder` gets `training.pt`, from which a run that was killed goes on, and `curve.png`. Returns
    the learning curve.
    """
    folder = Path(folder)
    context = usable(context, llm)
    seed = recipe.setdefault("seed", 0)
    found = prepare(llm, records, context, date)
    if isinstance(held_out, float | int):
        examples, unseen = split(found.examples, held_out, seed)
    else:
        examples, unseen = found.examples, prepare(llm, held_out, context, date).examples
    if not examples:
        raise ValueError("finetune: there is nothing to learn in these records")
    steps = num_steps(examples, context, batch, epochs, seed)
    defaults: dict[str, Any] = {"warmup": -(-steps // 20), "save_every": max(1, steps // 20)}
    defaults["data"] = sha256(repr((examples, context, batch, at_once)).encode()).hexdigest()
    settings = Recipe(**{"steps": steps, **defaults, **recipe})
    logger.info("%s", about(examples, settings.steps) + shortened(found, context))
    data = packed(examples, context, batch, at_once, seed)
    rows = [together(row) for row in fill(unseen, context, seed=0, epoch=0)]
    curve = train(llm.model, data, rows, settings, folder, mesh=mesh)
    if mesh is None or mesh.get_rank() == 0:
        title = f"{len(examples):,} examples, {epochs} epochs"
        draw_curve(curve, folder / "curve.png", title)
    return curve


def usable(context: int | None, llm: LLM) -> int:
    """The context, as given or by default. ValueError where the model has no such."""
    limit = llm.model.config.max_position_embeddings
    if context is None:
        return min(limit, 2048)
    if not 1 <= context <= limit:
        raise ValueError(f"context is {context}, allowed: 1 to the model's {limit}")
    return context


def prepare(llm: LLM, records: str | Path | Sequence[Record], context: int, date: str) -> Examples:
    """A file's, or those given, as the model will see them."""
    given = read_records(Path(records)) if isinstance(records, str | Path) else records
    return to_examples(given, llm.require_tokenizer(), llm.chat_format, context, date)


def split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """All but a share of them, and that share, which is drawn; both in their order."""
    if not 0 <= share < 1:
        raise ValueError(f"held_out is {share}, allowed: from 0 up to below 1")
    apart = {*random.Random(seed).sample(range(len(examples)), round(share * len(examples)))}
    kept = [example for i, example in enumerate(examples) if i not in apart]
    return kept, [example for i, example in enumerate(examples) if i in apart]


def about(examples: Sequence[Example], steps: int) -> str:
    """What is learned from, in one line."""
    tokens = sum(len(example.ids) for example in examples)
    learned = sum(sum(example.learned) for example in examples)
    share = f"{learned / tokens:.0%} of them to be learned"
    return f"{len(examples):,} examples, {tokens:,} tokens, {share}; {steps:,} steps"


def shortened(found: Examples, context: int) -> str:
    """What became of those that were too long; nothing if there were none."""
    line = f"; {found.num_cut:,} examples are cut to {context:,} tokens" if found.num_cut else ""
    lost = f"; {found.num_lost:,} are left out, too long for their answer" if found.num_lost else ""
    return line + lost
