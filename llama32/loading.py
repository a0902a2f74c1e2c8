"""A name becomes a model to use: weights, tokenizer, chat format and settings of one checkpoint."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama32 import checkpoint
from llama32.adapt.lora import LoRA, Pair, check_fit, merged
from llama32.adapt.optimize import Optimizer
from llama32.adapt.peft import load_lora
from llama32.adapt.quantize import quantize_layer
from llama32.chat import Chat, Control
from llama32.config import LlamaConfig
from llama32.engine.settings import EngineSettings
from llama32.files import read_json
from llama32.hub import resolve
from llama32.layouts import shapes
from llama32.llm import LLM
from llama32.model import Llama
from llama32.settings import Sampling
from llama32.tokenizer import Tokenizer


def load_model(
    name: str | Path = "tiny",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
    quantize: str | None = None,
    optimize: bool = False,
    lora: LoRA | str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Llama:
    """The model alone, an nn.Module: from a folder, a Hub id, or "tiny".

    It comes in the dtype that it is stored in unless `dtype` says otherwise. `rope_factor` is for
    Meta's layout, which does not say it. `quantize` ("int8", "int4", "fp8") and `optimize` are
    `llama32.quantize` and `llama32.optimize`, done to each layer as it is read, so that the model
    is never in memory in another form. `lora` is an adapter, or its folder, to be merged into the
    weights before. `on_progress(done, total)` counts the bytes read.
    """
    folder = resolve(name)
    pairs: dict[str, Pair] = {}
    if lora is not None:
        lora = lora if isinstance(lora, LoRA) else load_lora(lora)
        sizes = shapes(checkpoint.inspect(folder, rope_factor=rope_factor).config)
        sizes.setdefault("lm_head.weight", sizes["embed.weight"])
        check_fit(lora, {name.removesuffix(".weight"): (*size,) for name, size in sizes.items()})
        pairs = dict(lora.items())
    model = checkpoint.load_model(
        folder,
        device=device,
        dtype=dtype,
        rope_factor=rope_factor,
        on_progress=on_progress,
        on_layer=partial(adapt, pairs, quantize, Optimizer() if optimize else None),
    )
    return model.requires_grad_(False) if optimize else model


def adapt(
    pairs: Mapping[str, Pair],
    scheme: str | None,
    optimizer: Optimizer | None,
    model: Llama,
    name: str,
) -> None:
    """What is asked for, done to one layer."""
    if name in pairs:
        model.set_submodule(name, merged(model.get_submodule(name), pairs[name], name))
    if scheme is not None:
        quantize_layer(model, name, scheme)
    if optimizer is not None:
        optimizer.replace(model, name)


def load(
    name: str | Path = "tiny",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
    quantize: str | None = None,
    optimize: bool = False,
    lora: LoRA | str | Path | None = None,
    chat_style: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    engine: EngineSettings | None = None,
) -> LLM:
    """Load a checkpoint whole: a folder, a Hub id, or "tiny", which ships with the package.

    By default it goes to the GPU if there is one, in the dtype it is stored in. `rope_factor`
    overrides what is derived for Meta's layout, which does not say it. `quantize`, `optimize` and
    `lora` are as for `load_model`. `chat_style` is "hub" or "meta"; None takes "hub" if the
    checkpoint comes with a chat template in Llama 3's format. `engine` says how many requests run
    at once, and in how much memory.
    """
    folder = resolve(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(
        folder,
        device=device,
        dtype=dtype,
        rope_factor=rope_factor,
        quantize=quantize,
        optimize=optimize,
        lora=lora,
        on_progress=on_progress,
    )
    return assemble(folder, model, chat_style, engine)


def assemble(
    folder: Path,
    model: Llama,
    chat_style: str | None = None,
    engine: EngineSettings | None = None,
) -> LLM:
    """A model, and what else its folder says of how to use it."""
    tokenizer = Tokenizer.load(folder) if Tokenizer.find(folder) else None
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only "
            f"{model.config.vocab_size} rows; one of the two belongs to another checkpoint"
        )
    generation = read_json_if_there(folder / "generation_config.json")
    if chat_style is None and tokenizer and has_chat_template(folder, tokenizer):
        chat_style = "hub"
    return LLM(
        model=model,
        tokenizer=tokenizer,
        chat_format=Chat(tokenizer, chat_style) if tokenizer and chat_style else None,
        defaults=Sampling.from_generation_config(generation),
        eos_ids=eos_ids(generation, model.config, tokenizer),
        engine_settings=engine or EngineSettings(),
    )


def has_chat_template(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a checkpoint was taught the Llama 3 chat format.

    All of Llama 3 has the control tokens, the base models too; a template that uses them comes
    with Instruct models only. Meta's own layout has no templates, so there the tokens must do.
    """
    if Control.HEADER.value not in tokenizer.special:
        return False
    if not (folder / "tokenizer.json").exists():
        return True
    settings = read_json_if_there(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"  # where newer files keep it
    text = template.read_text("utf-8") if template.exists() else str(settings.get("chat_template"))
    return Control.HEADER.value in text


def eos_ids(
    generation: Mapping[str, Any], config: LlamaConfig, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """What ends a text: by generation_config.json, else config.json, else the tokenizer."""
    said = generation.get("eos_token_id")
    if said is not None:
        return tuple(said) if isinstance(said, list) else (said,)
    if config.eos_token_ids or tokenizer is None:
        return config.eos_token_ids
    ends = Control.EOS.value, Control.EOM.value, Control.EOT.value  # Meta's layout names none
    return tuple(tokenizer.special[end] for end in ends if end in tokenizer.special)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    return read_json(path) if path.exists() else {}
