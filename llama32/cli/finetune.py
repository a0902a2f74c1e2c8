"""`llama32 finetune`: options, and the files of a finished run."""

import shutil
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Option

from llama32.adapters.lora import ALL_LINEAR, LoRA, add_lora
from llama32.adapters.peft import save_lora
from llama32.checkpoint import hub
from llama32.checkpoint.layouts import COMPANION_FILES
from llama32.checkpoint.writer import save
from llama32.cli.options import Dtype, ModelOptions, options
from llama32.cli.terminal import note, out, show_log
from llama32.llm.llm import LLM
from llama32.train.examples import DEFAULT_DATE

adapter_option = partial(Option, rich_help_panel="Adapter")
training_option = partial(Option, rich_help_panel="Training")
# Options with an old flag, which is accepted for another release.
DEPRECATED_FLAGS = {"micro_batch": "--at-once", "activation_checkpointing": "--recompute"}


@dataclass
class AdapterOptions:
    """The trained weights: a LoRA adapter, or all weights."""

    rank: Annotated[int, adapter_option(min=1, help="Rank of the LoRA matrices.")] = 8
    alpha: Annotated[
        float | None,
        adapter_option(help="The change is scaled by alpha / rank. [default: 2 * rank]"),
    ] = None
    dropout: Annotated[float, adapter_option(min=0, max=0.9, help="Dropout of the inputs.")] = 0.0
    targets: Annotated[
        list[str] | None,
        adapter_option(
            "--target", help="Linear layers to adapt; repeatable. [default: all seven of a block]"
        ),
    ] = None
    full: Annotated[
        bool, adapter_option("--full", help="Train all weights in fp32, without an adapter.")
    ] = False

    def add(self, llm: LLM, seed: int) -> LoRA | None:
        """Add a fresh adapter to the model; None with `--full`."""
        if self.full:
            return None
        targets = self.targets or ALL_LINEAR
        settings = {"alpha": self.alpha, "dropout": self.dropout, "seed": seed}
        return add_lora(llm.model, targets, self.rank, **settings)


@dataclass
class TrainingOptions:
    """Batches, learning rate and memory of a training run."""

    epochs: Annotated[int, training_option(min=1, help="Passes over the examples.")] = 3
    batch: Annotated[int, training_option(min=1, help="Rows of examples per optimizer step.")] = 8
    micro_batch: Annotated[
        int, training_option(min=1, help="Rows per forward pass; gradients accumulate.")
    ] = 1
    context: Annotated[
        int | None,
        training_option(min=2, help="Tokens per row. [default: the model's context, at most 2048]"),
    ] = None
    peak_rate: Annotated[
        float | None,
        training_option("--rate", help="Peak learning rate. [default: 2e-4; 2e-5 with --full]"),
    ] = None
    held_out: Annotated[
        float,
        training_option(min=0, max=0.9, help="Share of the examples held out for evaluation."),
    ] = 0.05
    date: Annotated[str, training_option(help="Date in the system message of dialogs.")] = (
        DEFAULT_DATE
    )
    seed: Annotated[int, training_option(help="Seed of the order, the adapter and dropout.")] = 0
    activation_checkpointing: Annotated[
        bool,
        training_option(
            "--activation-checkpointing", help="Save memory; every layer runs forward twice."
        ),
    ] = False
    fp32: Annotated[
        bool, training_option("--fp32", help="Matrix products in fp32 instead of bf16.")
    ] = False

    old_micro_batch: Annotated[int | None, Option("--at-once", hidden=True, min=1)] = None
    old_activation_checkpointing: Annotated[bool, Option("--recompute", hidden=True)] = False

    def settings(self, *, full: bool) -> dict[str, Any]:
        """Return the keyword arguments of `finetune`; deprecated flags warn."""
        settings = dict(vars(self))
        for name, old_flag in DEPRECATED_FLAGS.items():
            if value := settings.pop(f"old_{name}"):
                new_flag = f"--{name.replace('_', '-')}"
                warnings.warn(f"{old_flag} is now {new_flag}", DeprecationWarning, stacklevel=2)
                settings[name] = value
        settings["autocast"] = None if settings.pop("fp32") else torch.bfloat16
        settings["peak_rate"] = self.peak_rate or (2e-5 if full else 2e-4)
        return settings


@options(source=ModelOptions, adapter=AdapterOptions, training=TrainingOptions)
def finetune(
    source: ModelOptions,
    adapter: AdapterOptions,
    training: TrainingOptions,
    data: Annotated[
        Path,
        Argument(
            help="Examples, one JSON object per line.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    to: Annotated[Path, Option("--out", "-o", help="Folder for the result.", file_okay=False)],
) -> None:
    """Train a model, or an adapter, on examples.

    A line of DATA is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. The
    loss covers the assistant's messages, the completion or the text. The same command resumes an
    interrupted run.
    """
    try:
        from llama32.train.finetune import finetune
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llama32[train]"') from None
    if source.optimize:
        raise ValueError("--optimize packs weights for use, not for training")
    if source.lora and not adapter.full:
        advice = "train with --full, or save the merged model first"
        raise ValueError(f"--lora: a new adapter would depend on the merged one; {advice}")
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
    note(f"{to / 'curve.png'} shows the learning curve; next: llama32 {command} {use}")


def write_model(llm: LLM, base: Path, folder: Path) -> None:
    """Save all weights in their original dtype, with the tokenizer and settings."""
    stored = llm.model.config.dtype
    save(llm.model.to(getattr(torch, stored)) if stored else llm.model, folder)
    for name in (*COMPANION_FILES, "tokenizer.model"):
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
