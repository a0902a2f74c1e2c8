"""`llama32 finetune`: its options, and what it leaves in a folder."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Option

from llama32 import hub
from llama32.adapt.lora import LINEARS, LoRA, add_lora
from llama32.adapt.peft import save_lora
from llama32.layouts import BESIDE
from llama32.llm import LLM
from llama32.options import Dtype, Source, options
from llama32.saving import save
from llama32.terminal import note, out, show_log
from llama32.train.examples import DATE

about_adapter = partial(Option, rich_help_panel="Adapter")
about_training = partial(Option, rich_help_panel="Training")


@dataclass
class Adapter:
    """What is trained: a LoRA, or everything."""

    rank: Annotated[int, about_adapter(min=1, help="Of its matrices.")] = 8
    alpha: Annotated[
        float | None, about_adapter(help="Its change counts alpha / rank times; by default 2.")
    ] = None
    dropout: Annotated[float, about_adapter(min=0, max=0.9, help="Of its inputs.")] = 0.0
    targets: Annotated[
        list[str] | None,
        about_adapter("--target", help="Layers that get one; by default all seven of a block."),
    ] = None
    full: Annotated[
        bool, about_adapter("--full", help="No adapter: train all weights, in fp32.")
    ] = False

    def add(self, llm: LLM, seed: int) -> LoRA | None:
        """Put it in, if there is to be one."""
        if self.full:
            return None
        targets = self.targets or LINEARS
        settings = {"alpha": self.alpha, "dropout": self.dropout, "seed": seed}
        return add_lora(llm.model, targets, self.rank, **settings)


@dataclass
class Training:
    """How it is trained."""

    epochs: Annotated[int, about_training(min=1, help="How often each example comes.")] = 3
    batch: Annotated[int, about_training(min=1, help="Rows of examples in a step.")] = 8
    at_once: Annotated[
        int, about_training(min=1, help="Of these, how many go through the model together.")
    ] = 1
    context: Annotated[
        int | None, about_training(min=2, help="Tokens of a row; by default the model's, or 2048.")
    ] = None
    peak_rate: Annotated[
        float | None,
        about_training("--rate", help="Learning rate; by default 2e-4, and 2e-5 with --full."),
    ] = None
    held_out: Annotated[
        float, about_training(min=0, max=0.9, help="Share of the examples not learned from.")
    ] = 0.05
    date: Annotated[str, about_training(help="What dialogs take for today.")] = DATE
    seed: Annotated[int, about_training(help="Of the order, the adapter and dropout.")] = 0
    recompute: Annotated[
        bool, about_training("--recompute", help="Less memory: layers run forward twice.")
    ] = False
    fp32: Annotated[bool, about_training("--fp32", help="Multiply matrices in fp32, not bf16.")] = (
        False
    )

    def settings(self, *, full: bool) -> dict[str, Any]:
        """For `finetune`."""
        given = dict(vars(self))
        given["autocast"] = None if given.pop("fp32") else torch.bfloat16
        given["peak_rate"] = self.peak_rate or (2e-5 if full else 2e-4)
        return given


@options(source=Source, adapter=Adapter, training=Training)
def finetune(
    source: Source,
    adapter: Adapter,
    training: Training,
    data: Annotated[
        Path, Argument(help="JSON lines.", exists=True, dir_okay=False, show_default=False)
    ],
    to: Annotated[
        Path, Option("--out", "-o", help="Where what comes of it goes.", file_okay=False)
    ],
) -> None:
    """Train a model, or an adapter for it, on examples.

    Each line of DATA is {"messages": [...]}, of which the assistant's part is learned;
    {"prompt": ..., "completion": ...}; or {"text": ...}. A run that was interrupted goes on when
    the same command is given again.
    """
    try:
        from llama32.train.finetune import finetune
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llama32[train]"') from None
    if source.optimize:
        raise ValueError("--optimize packs weights for use, not for training")
    if source.lora and not adapter.full:
        advice = "train with --full, or save the merged model first"
        raise ValueError(f"--lora: a new adapter would be of no use without that one; {advice}")
    if adapter.full:
        if source.quantize:
            raise ValueError("--full needs weights in fp32: leave out --quantize, or --full")
        source.dtype = Dtype.float32
    show_log()
    llm = source.load(bars=True)
    lora = adapter.add(llm, training.seed)
    curve = finetune(llm, data, to, **training.settings(full=adapter.full))
    folder = hub.resolve(source.model)
    if lora is None:
        write_model(llm, folder, to)
        use = f"--model {to}"
    else:
        save_lora(lora, to, base_model=source.model)
        use = f"--model {source.model} --lora {to}"
    before, after = curve[0].held_out, curve[-1].held_out
    if before is not None and after is not None:
        out.print(f"held-out loss, nats per token: {before:.4f} -> {after:.4f}")
    command = "chat" if llm.chat_format else 'generate "Once upon a time"'
    note(f"{to / 'curve.png'} shows how it went; next: llama32 {command} {use}")


def write_model(llm: LLM, base: Path, folder: Path) -> None:
    """All weights, in the dtype that they came in, and what belongs to them."""
    stored = llm.model.config.dtype
    save(llm.model.to(getattr(torch, stored)) if stored else llm.model, folder)
    for name in (*BESIDE, "tokenizer.model"):
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
