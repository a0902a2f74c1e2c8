"""Adapters as files: the format of PEFT, in which the Hub has them.

`adapter_config.json` says how the pairs are scaled, `adapter_model.safetensors` holds them, by the
Hub's names of their layers behind "base_model.model.". (PEFT 0.5 and later)
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama32.adapt.lora import LoRA, Pair
from llama32.files import read_json
from llama32.layouts import names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_LAYERS = 1000
# What would change the arithmetic, each with the value at which it does not.
PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


def save_lora(lora: LoRA, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write an adapter as PEFT does. `base_model` is what it was trained on: a Hub id, for others
    to find it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub = layer_names()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, pair in lora.items():
        tensors[f"{PREFIX}{hub[name]}.lora_A.weight"] = pair.a.detach().contiguous()
        tensors[f"{PREFIX}{hub[name]}.lora_B.weight"] = pair.b.detach().contiguous()
        ranks[hub[name]], alphas[hub[name]] = len(pair.a), pair.scale * len(pair.a)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({name.split(".")[-1] for name in ranks}),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "inference_mode": True,
        **PLAIN,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes it private


def load_lora(folder: str | Path) -> LoRA:
    """Read an adapter that PEFT or `save_lora` wrote. Put it into a model with `using_lora`,
    `put_lora` or `merge_lora`. ValueError for what it asks for and cannot be had here."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    check(folder, config)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    ours = {f"{PREFIX}{hub}": name for name, hub in layer_names().items()}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, half = key.removesuffix(".weight").rpartition(".")
        if layer not in ours or half not in ("lora_A", "lora_B"):
            raise ValueError(f"{folder / WEIGHTS}: {key} is no part of a LoRA of a Llama")
        halves.setdefault(layer, {})[half] = tensor.float()
    pairs: dict[str, Pair] = {}
    for layer, pair in halves.items():
        if len(pair) < 2 or len(pair["lora_A"]) != pair["lora_B"].shape[-1]:
            raise ValueError(f"{folder / WEIGHTS}: {layer}: A and B do not belong together")
        hub, rank = layer.removeprefix(PREFIX), len(pair["lora_A"])
        scale = scale_of(config, hub, rank)
        pairs[ours[layer]] = Pair(pair["lora_A"], pair["lora_B"], scale)
    return LoRA(pairs, config.get("lora_dropout") or 0.0)


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """ValueError where it is not a plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for key, plain in PLAIN.items():
        if config.get(key) not in (None, [], plain):
            raise ValueError(f"{folder / CONFIG}: {key} is {config[key]!r}: not supported")


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """By what the change of a layer is scaled. A pattern is the end of a layer's name."""
    alpha = config["lora_alpha"]
    for pattern, its in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = its
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def layer_names() -> dict[str, str]:
    """Ours, each with the Hub's."""
    hub = names("hub", MOST_LAYERS)
    return {ours.removesuffix(".weight"): its.removesuffix(".weight") for ours, its in hub.items()}
