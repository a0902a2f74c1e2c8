"""Model to files: the Hub's layout, which the whole ecosystem reads."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama32.checkpoint import check_shapes, spelled
from llama32.config import LlamaConfig
from llama32.layouts import HUB_FILE, HUB_INDEX, PARTS, names, shapes, tensors
from llama32.model import Llama


def save(model: Llama, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and the weights in the Hub's layout, in files of at most `max_shard_bytes`
    (or one tensor).

    All is written aside and renamed at the end, so a full disk or a kill leaves what was there
    whole. An older checkpoint in the folder is replaced; other files of it stay.
    """
    folder = Path(folder)
    weights = tensors(model)
    config = dataclasses.replace(
        model.config,
        tie_word_embeddings="lm_head.weight" not in weights,
        dtype=spelled(model.norm.weight.dtype),
    )
    found = {name: weight.shape for name, weight in weights.items()}
    advice = "merge or remove adapters before saving; save it before it is optimized"
    check_shapes("model", found, shapes(config), advice)
    hub = names("hub", config.num_hidden_layers, PARTS)
    shards = _shards({hub[name]: weight for name, weight in weights.items()}, max_shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
            _write(Path(aside), config, shards)
            _move(Path(aside), folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: the checkpoint was not saved: {error}") from error


def _shards(weights: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight.detach()
        size += weight.nbytes
    return shards


def _write(folder: Path, config: LlamaConfig, shards: list[dict[str, Tensor]]) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hub(), indent=2) + "\n")
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else HUB_FILE
        on_cpu = {name: weight.cpu().contiguous() for name, weight in shard.items()}
        save_file(on_cpu, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes it private
        places |= dict.fromkeys(shard, file)
    if shards[1:]:
        size = sum(weight.nbytes for shard in shards for weight in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / HUB_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _move(aside: Path, folder: Path) -> None:
    """Put the new files in place, then take away what an older checkpoint leaves beside them."""
    new = sorted(file.name for file in aside.iterdir())
    for name in new:
        (aside / name).replace(folder / name)
    for pattern in (HUB_FILE, HUB_INDEX, "model-*-of-*.safetensors"):
        for old in folder.glob(pattern):
            if old.name not in new:
                old.unlink()
