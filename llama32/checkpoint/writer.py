"""Write a model to files in the Hub's layout, which the whole ecosystem reads."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama32.checkpoint.checks import check_shapes, dtype_name
from llama32.checkpoint.layouts import (
    HUB_FILE,
    HUB_INDEX,
    TENSOR_SUFFIXES,
    name_map,
    named_tensors,
    tensor_shapes,
)
from llama32.config import LlamaConfig
from llama32.model import Llama


def save(model: Llama, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and the weights in the Hub's layout.

    A file holds at most `max_shard_bytes` bytes, or one larger tensor. All files are written to a
    temporary folder and renamed at the end: a full disk or a kill leaves the old checkpoint intact.
    An older checkpoint in the folder is replaced; other files stay. Raises ValueError if the
    tensors do not match the config, OSError if writing fails.
    """
    folder = Path(folder)
    weights = named_tensors(model)
    config = dataclasses.replace(
        model.config,
        tie_word_embeddings="lm_head.weight" not in weights,
        dtype=dtype_name(model.norm.weight.dtype),
    )
    shapes = {name: weight.shape for name, weight in weights.items()}
    advice = "merge or remove adapters before saving; save the model before it is optimized"
    check_shapes("model", shapes, tensor_shapes(config), advice)
    hub = name_map("hub", config.num_hidden_layers, TENSOR_SUFFIXES)
    hub_weights = {hub[name]: weight for name, weight in weights.items()}
    shards = _split_into_shards(hub_weights, max_shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            _write_files(Path(temporary), config, shards)
            _replace_files(Path(temporary), folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: the checkpoint was not saved: {error}") from error


def _split_into_shards(weights: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight.detach()
        size += weight.nbytes
    return shards


def _write_files(folder: Path, config: LlamaConfig, shards: list[dict[str, Tensor]]) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hub(), indent=2) + "\n")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else HUB_FILE
        on_cpu = {name: weight.cpu().contiguous() for name, weight in shard.items()}
        save_file(on_cpu, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors creates private files
        weight_map |= dict.fromkeys(shard, file)
    if shards[1:]:
        size = sum(weight.nbytes for shard in shards for weight in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / HUB_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _replace_files(source: Path, folder: Path) -> None:
    """Move the new files into the folder, then delete weight files of an older checkpoint."""
    new = sorted(file.name for file in source.iterdir())
    for name in new:
        (source / name).replace(folder / name)
    for pattern in (HUB_FILE, HUB_INDEX, "model-*-of-*.safetensors"):
        for old in folder.glob(pattern):
            if old.name not in new:
                old.unlink()
