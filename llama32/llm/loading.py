"""Load a checkpoint by name: weights, tokenizer, chat format and settings."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama32.adapters.lora import LoRA, LoRAWeights, check_fit, merge_layer
from llama32.adapters.peft import load_lora
from llama32.checkpoint import reader
from llama32.checkpoint.hub import resolve
from llama32.checkpoint.layouts import tensor_shapes
from llama32.config import LlamaConfig
from llama32.engine.settings import EngineSettings
from llama32.json_files import read_json
from llama32.kernels.autotune import Autotuner
from llama32.llm.llm import LLM
from llama32.model import Llama
from llama32.quantization.quantize import quantize_layer
from llama32.sampling_params import Sampling
from llama32.text.chat import Chat, Control
from llama32.text.tokenizer import Tokenizer


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
    """Load the model alone, an nn.Module, from a folder, a Hub id, or "tiny".

    `dtype` None keeps the stored dtype. `rope_factor` is for Meta's layout, whose files
    lack the factor. `quantize` ("int8", "int4", "fp8") and `optimize` apply `llama32.quantize`
    and `llama32.optimize` to each layer as soon as it is read, so the unquantized model is never
    whole in memory. `lora` is an adapter or its folder, merged into the weights first.
    `on_progress(done, total)` counts the bytes read.
    """
    folder = resolve(name)
    lora_weights: dict[str, LoRAWeights] = {}
    if lora is not None:
        lora = lora if isinstance(lora, LoRA) else load_lora(lora)
        sizes = tensor_shapes(reader.inspect(folder, rope_factor=rope_factor).config)
        sizes.setdefault("lm_head.weight", sizes["embed.weight"])
        check_fit(lora, {name.removesuffix(".weight"): (*size,) for name, size in sizes.items()})
        lora_weights = dict(lora.items())
    model = reader.read_model(
        folder,
        device=device,
        dtype=dtype,
        rope_factor=rope_factor,
        on_progress=on_progress,
        on_layer=partial(prepare_layer, lora_weights, quantize, Autotuner() if optimize else None),
    )
    return model.requires_grad_(False) if optimize else model


def prepare_layer(
    lora_weights: Mapping[str, LoRAWeights],
    scheme: str | None,
    optimizer: Autotuner | None,
    model: Llama,
    name: str,
) -> None:
    """Merge, quantize and optimize a layer, as requested."""
    if name in lora_weights:
        model.set_submodule(name, merge_layer(model.get_submodule(name), lora_weights[name], name))
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
    """Load a complete checkpoint: a folder, a Hub id, or "tiny", which ships with the package.

    By default the model goes to the GPU if the machine has one, in the stored dtype. `rope_factor`
    overrides the derived factor for Meta's layout, whose files lack the factor. `quantize`,
    `optimize` and `lora` are as in `load_model`. `chat_style` is "hub" or "meta"; None means "hub"
    if the checkpoint has a chat template in Llama 3's format. `engine` sets how many requests run
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
    """Join a model with the tokenizer, chat format and settings in the folder.

    Raises ValueError if the tokenizer does not fit the model.
    """
    tokenizer = Tokenizer.load(folder) if Tokenizer.find(folder) else None
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only "
            f"{model.config.vocab_size} rows; one of them belongs to another checkpoint"
        )
    generation = read_optional_json(folder / "generation_config.json")
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
    """True if the checkpoint was trained on the Llama 3 chat format.

    All Llama 3 tokenizers have the control tokens, but only Instruct models have a template with
    control tokens. Meta's layout has no templates, so the tokenizer decides.
    """
    if Control.HEADER.value not in tokenizer.special:
        return False
    if not (folder / "tokenizer.json").exists():
        return True
    settings = read_optional_json(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"  # newer checkpoints
    text = template.read_text("utf-8") if template.exists() else str(settings.get("chat_template"))
    return Control.HEADER.value in text


def eos_ids(
    generation: Mapping[str, Any], config: LlamaConfig, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return the end ids of generation_config.json, else config.json, else the tokenizer."""
    ids = generation.get("eos_token_id")
    if ids is not None:
        return tuple(ids) if isinstance(ids, list) else (ids,)
    if config.eos_token_ids or tokenizer is None:
        return config.eos_token_ids
    ends = Control.EOS.value, Control.EOM.value, Control.EOT.value  # not stored in Meta's layout
    return tuple(tokenizer.special[end] for end in ends if end in tokenizer.special)


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if the file does not exist."""
    return read_json(path) if path.exists() else {}
