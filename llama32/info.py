"""What a folder holds and what it takes to run it, found out without loading its weights."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table

from llama32 import checkpoint
from llama32.cache import PAGE_SIZE
from llama32.flash import fastest, flash
from llama32.loading import assemble
from llama32.model import Llama
from llama32.settings import Sampling


def describe(
    folder: Path, *, rope_factor: float | None = None, context: int | None = None
) -> dict[str, Any]:
    """All of it as JSON carries it; sizes are in bytes.

    The KV cache is that of one sequence of `context` tokens, by default as long as the model's
    context, in bf16.
    """
    found = checkpoint.inspect(folder, rope_factor=rope_factor)
    config = found.config
    with torch.device("meta"):
        model = Llama(config)
    llm = assemble(folder, model)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # k and v
    context = context or config.max_position_embeddings
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attend = fastest(device, torch.bfloat16, config.head_dim, PAGE_SIZE)
    texts = {id: text for text, id in llm.tokenizer.special.items()} if llm.tokenizer else {}
    return {
        "found": str(found),
        "config": asdict(config),
        "num_parameters": found.num_parameters,
        "weights": {"stored": found.nbytes, "bfloat16": 2 * found.num_parameters},
        "kv_cache": {"tokens": context, "bfloat16": 2 * token * context},
        "tokenizer": llm.tokenizer and llm.tokenizer.source,
        "chat_format": llm.chat_format and llm.chat_format.render.__name__,
        "eos": {id: texts.get(id) for id in llm.eos_ids},
        "sampling": asdict(llm.defaults),
        "attention": {"device": str(device), "form": "flash" if attend is flash else "fused"},
    }


def tables(facts: dict[str, Any]) -> Iterable[Table]:
    """The same for people: what the config says, and what follows from it."""
    config = facts["config"]
    cache, weights, attention = facts["kv_cache"], facts["weights"], facts["attention"]
    eos = (f"{id} {text}" if text else str(id) for id, text in facts["eos"].items())
    usual = asdict(Sampling())
    said = {k: v for k, v in facts["sampling"].items() if k == "temperature" or v != usual[k]}
    yield section("Config", config)
    yield section(
        "In use",
        {
            "parameters": f"{facts['num_parameters']:,}",
            "weights": f"{decimal(weights['stored'])} as stored, "
            f"{decimal(weights['bfloat16'])} in bfloat16",
            "KV cache": f"{decimal(cache['bfloat16'])} in bfloat16, of {cache['tokens']:,} tokens",
            "tokenizer": facts["tokenizer"] or "none: ids only",
            "chat format": facts["chat_format"] or "none: generate only",
            "a text ends with": ", ".join(eos),
            "sampling": said,
            "attention": f"{attention['form']}, on {attention['device']}",
        },
    )


def section(title: str, rows: dict[str, Any]) -> Table:
    """Names and values side by side; what is empty is left out."""
    table = Table(
        title=title, title_style="bold", title_justify="left", box=None, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value not in (None, (), ""):
            table.add_row(name, spelled(value))
    return table


def spelled(value: Any) -> str:
    """A value as people write it."""
    match value:
        case float():
            return f"{value:.12g}"
        case dict():
            return ", ".join(f"{name} {spelled(part)}" for name, part in value.items())
        case list() | tuple():
            return ", ".join(map(spelled, value))
    return str(value)
