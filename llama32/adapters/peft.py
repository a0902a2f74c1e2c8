"""Adapter files in PEFT's format, the format of the Hub.

`adapter_config.json` holds ranks and scales, `adapter_model.safetensors` the matrices A and B,
named "base_model.model." plus the layer's Hub name. (PEFT 0.5 and later)
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

from llama32.adapters.lora import LoRA, LoRAWeights
from llama32.checkpoint.layouts import name_map
from llama32.json_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_LAYERS = 1000
# Config fields of LoRA variants that change the arithmetic, with the values of plain LoRA.
PLAIN_VALUES: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


def save_lora(lora: LoRA, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write an adapter in PEFT's format.

    `base_model` is the Hub id of the model that the adapter was trained on, recorded in the config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub = hub_layer_names()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, weights in lora.items():
        tensors[f"{PREFIX}{hub[name]}.lora_A.weight"] = weights.a.detach().contiguous()
        tensors[f"{PREFIX}{hub[name]}.lora_B.weight"] = weights.b.detach().contiguous()
        ranks[hub[name]], alphas[hub[name]] = len(weights.a), weights.scale * len(weights.a)
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
        **PLAIN_VALUES,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors creates private files


def load_lora(folder: str | Path) -> LoRA:
    """Read an adapter written by PEFT or `save_lora`.

    Apply the result to a model with `using_lora`, `attach_lora` or `merge_lora`. Raises ValueError
    for damaged files, and for LoRA variants that are not supported.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    check_config(folder, config)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    names = {f"{PREFIX}{hub}": name for name, hub in hub_layer_names().items()}
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, matrix = key.removesuffix(".weight").rpartition(".")
        if layer not in names or matrix not in ("lora_A", "lora_B"):
            raise ValueError(f"{folder / WEIGHTS}: {key} is not a LoRA weight of a Llama layer")
        matrices.setdefault(layer, {})[matrix] = tensor.float()
    weights: dict[str, LoRAWeights] = {}
    for layer, found in matrices.items():
        a, b = found.get("lora_A"), found.get("lora_B")
        if a is None or b is None or len(a) != b.shape[-1]:
            raise ValueError(
                f"{folder / WEIGHTS}: {layer} needs lora_A and lora_B of the same rank"
            )
        scale = lora_scale(config, layer.removeprefix(PREFIX), len(a))
        weights[names[layer]] = LoRAWeights(a, b, scale)
    return LoRA(weights, config.get("lora_dropout") or 0.0)


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the config describes plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, allowed: 'LORA'"
        )
    for key, plain in PLAIN_VALUES.items():
        if config.get(key) not in (None, [], plain):
            raise ValueError(f"{folder / CONFIG}: {key} is {config[key]!r}, allowed: {plain!r}")


def lora_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the scale of a layer's change. An alpha pattern matches the end of the layer name."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def hub_layer_names() -> dict[str, str]:
    """Return the map from layer names of `Llama` to layer names of the Hub."""
    names = name_map("hub", MAX_LAYERS)
    return {
        name.removesuffix(".weight"): hub.removesuffix(".weight") for name, hub in names.items()
    }
