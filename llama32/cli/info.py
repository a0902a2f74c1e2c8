"""`llama32 info`: contents and memory of a checkpoint, without loading weights."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table

from llama32.cache.flash_attention import flash, select_backend
from llama32.cache.kv_cache import PAGE_SIZE
from llama32.checkpoint import reader
from llama32.llm.loading import assemble
from llama32.model import Llama
from llama32.sampling_params import Sampling


def describe(
    folder: Path, *, rope_factor: float | None = None, context: int | None = None
) -> dict[str, Any]:
    """Return the facts of a checkpoint as a JSON object; sizes in bytes.

    "kv_cache" is the memory of a sequence of `context` tokens in bf16, by default the model's
    whole context.
    """
    checkpoint = reader.inspect(folder, rope_factor=rope_factor)
    config = checkpoint.config
    with torch.device("meta"):
        model = Llama(config)
    llm = assemble(folder, model)
    token_size = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )  # k and v
    context = context or config.max_position_embeddings
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attend = select_backend(device, torch.bfloat16, config.head_dim, PAGE_SIZE)
    texts = {id: text for text, id in llm.tokenizer.special.items()} if llm.tokenizer else {}
    return {
        "found": str(checkpoint),
        "config": asdict(config),
        "num_parameters": checkpoint.num_parameters,
        "weights": {"stored": checkpoint.nbytes, "bfloat16": 2 * checkpoint.num_parameters},
        "kv_cache": {"tokens": context, "bfloat16": 2 * token_size * context},
        "tokenizer": llm.tokenizer and llm.tokenizer.source,
        "chat_format": llm.chat_format and llm.chat_format.style,
        "eos": {id: texts.get(id) for id in llm.eos_ids},
        "sampling": asdict(llm.defaults),
        "attention": {"device": str(device), "form": "flash" if attend is flash else "fused"},
    }


def tables(facts: dict[str, Any]) -> Iterable[Table]:
    """Return tables of the facts: the config, and the derived sizes and settings."""
    config = facts["config"]
    cache, weights, attention = facts["kv_cache"], facts["weights"], facts["attention"]
    eos = (f"{id} {text}" if text else str(id) for id, text in facts["eos"].items())
    defaults = asdict(Sampling())
    sampling = {
        name: value
        for name, value in facts["sampling"].items()
        if name == "temperature" or value != defaults[name]
    }
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
            "sampling": sampling,
            "attention": f"{attention['form']}, on {attention['device']}",
        },
    )


def section(title: str, rows: dict[str, Any]) -> Table:
    """Return a table of names and values, without empty values."""
    table = Table(
        title=title, title_style="bold", title_justify="left", box=None, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value not in (None, (), ""):
            table.add_row(name, format_value(value))
    return table


def format_value(value: Any) -> str:
    """Format a value for reading."""
    match value:
        case float():
            return f"{value:.12g}"
        case dict():
            return ", ".join(f"{name} {format_value(part)}" for name, part in value.items())
        case list() | tuple():
            return ", ".join(map(format_value, value))
    return str(value)
