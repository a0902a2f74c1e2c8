"""Files to model, and model to files.

`inspect(folder)` tells what a folder holds, from its headers alone; `load_model(folder)` makes it
an nn.Module; `save(model, folder)` writes the Hub's layout, which the whole ecosystem reads.
"""

import dataclasses
import json
import logging
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from llama32.config import LlamaConfig
from llama32.layouts import (
    HUB_FILE,
    HUB_INDEX,
    META_FILES,
    Layout,
    MappedFiles,
    StoredTensor,
    few,
    names,
    open_hub,
    open_meta,
    shapes,
)
from llama32.model import Llama

logger = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IGNORED = ("rotary_emb.inv_freq", "rope.freqs")  # old exports store what the config tells
UNTIED = (
    "config.json ties lm_head to the embedding, but both are stored and differ; both are used "
    "(set tie_word_embeddings to false to silence this)"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, checked against its config. No weight has been read."""

    folder: Path
    layout: Layout
    config: LlamaConfig
    tensors: Mapping[str, StoredTensor]  # by our names; no lm_head where it is tied

    @property
    def files(self) -> list[Path]:
        return sorted({file for tensor in self.tensors.values() for file in tensor.files})

    @property
    def num_parameters(self) -> int:
        return sum(tensor.shape.numel() for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.shape.numel()
        return sizes.most_common(1)[0][0]

    def __str__(self) -> str:
        whose = "the Hub's" if self.layout == "hub" else "Meta's"
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        embeddings = "tied" if self.config.tie_word_embeddings else "untied"
        bend = self.config.rope_scaling
        return (
            f"{self.folder}: {whose} layout, {files}, {self.nbytes / 1e6:,.1f} MB; "
            f"{self.num_parameters:,} parameters in {_spelled(self.dtype)}, {embeddings} "
            f"embeddings, RoPE {f'slowed by {bend.factor:g}' if bend else 'without scaling'}"
        )


def inspect(folder: str | Path, *, rope_factor: float | None = None) -> Checkpoint:
    """Find out which layout a folder holds; check all names, shapes and dtypes against its config.

    `rope_factor` tells for Meta's layout what its files leave open (`LlamaConfig.from_meta`).
    An lm_head is dropped where it repeats a tied embedding. Where the config ties it but it
    differs, the weights are believed, as by transformers, and a warning says so.
    """
    folder, layout = _find(Path(folder))
    if layout == "meta":
        config, stored = open_meta(folder, rope_factor)
    elif rope_factor is None:
        config, stored = open_hub(folder)
    else:
        raise ValueError(f"{folder}: rope_factor is for Meta's layout; here config.json says it")
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED)}
    if odd := [name for name, tensor in stored.items() if tensor.dtype not in FLOATS]:
        kind = _spelled(stored[odd[0]].dtype)
        raise ValueError(f"{folder}: {few(odd)} in {kind}; only unquantized float weights load")
    theirs = names(layout, config.num_hidden_layers)
    embed, lm_head = stored.get(theirs["embed.weight"]), stored.get(theirs["lm_head.weight"])
    if config.tie_word_embeddings and embed and lm_head:
        if embed.dtype == lm_head.dtype and torch.equal(embed.read(), lm_head.read()):
            del stored[lm_head.name]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
            if layout == "hub":
                warnings.warn(f"{folder}: {UNTIED}", stacklevel=2)
    wanted = {theirs[name]: shape for name, shape in shapes(config).items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    _check_shapes(folder, found, wanted, "only complete Llamas without biases or adapters load")
    tensors = {ours: stored[name] for ours, name in theirs.items() if name in stored}
    return Checkpoint(folder, layout, config, tensors)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Llama:
    """The model in a folder, in either layout, as it is stored unless `dtype` says otherwise.

    Each weight goes from the mapped file straight to its place, so memory peaks at the weights
    plus the largest tensor. It is copied there even on a CPU that could compute on the mapping:
    that costs 0.2 s per GB once, but products with mapped weights are 10% slower every time, and
    a file that is changed or cut while it is mapped changes or kills the process. NaN and infinity
    are warned of; to look for them costs 0.04 s per GB. `on_progress(done, total)` counts the bytes
    read. What was found is logged at level INFO. Whatever is wrong with the files is a ValueError
    or a FileNotFoundError of one line.
    """
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype {dtype}: weights load in {', '.join(map(_spelled, FLOATS))}")
    found = inspect(path, rope_factor=rope_factor)
    logger.info("%s", found)
    dtype = dtype or found.dtype
    with torch.device("meta"):
        model = Llama(found.config)
    files = MappedFiles(budget=max(stored.nbytes for stored in found.tensors.values()))
    done, total, broken = 0, found.nbytes, []
    for name, stored in found.tensors.items():
        weight = torch.empty(stored.shape, dtype=dtype, device=device)
        stored.copy_to(weight, files)
        if not torch.stack(weight.aminmax()).isfinite().all():
            broken.append(stored.name)
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(weight)
        done += stored.nbytes
        if on_progress is not None:
            on_progress(done, total)
    if found.config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    if broken:
        warnings.warn(f"{path}: NaN or infinity in {few(broken)}", stacklevel=2)
    return model.to(device)  # the weights are there already; this takes the rotary speeds along


def save(model: Llama, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and the weights in the Hub's layout, in files of at most `max_shard_bytes`
    (or one tensor).

    All is written aside and renamed at the end, so a full disk or a kill leaves what was there
    whole. An older checkpoint in the folder is replaced; other files of it stay.
    """
    folder = Path(folder)
    weights = dict(model.named_parameters())  # a tied lm_head is not named twice
    config = dataclasses.replace(
        model.config,
        tie_word_embeddings="lm_head.weight" not in weights,
        dtype=_spelled(next(iter(weights.values())).dtype),
    )
    found = {name: weight.shape for name, weight in weights.items()}
    _check_shapes("model", found, shapes(config), "merge or remove adapters before saving")
    hub = names("hub", config.num_hidden_layers)
    shards = _shards({hub[name]: weight for name, weight in weights.items()}, max_shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
            _write(Path(aside), config, shards)
            _move(Path(aside), folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: the checkpoint was not saved: {error}") from error


def _find(folder: Path) -> tuple[Path, Layout]:
    if not folder.is_dir():
        what = "a file; give the folder that holds it" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}")
    if (folder / HUB_FILE).is_file() or (folder / HUB_INDEX).is_file():
        return folder, "hub"
    for place in (folder, folder / "original"):
        if (place / "params.json").is_file() and any(place.glob(META_FILES)):
            return place, "meta"
    raise FileNotFoundError(
        f"{folder}: no checkpoint here; looked for {HUB_FILE}, {HUB_INDEX}, and params.json with "
        f"{META_FILES} (also in original/)"
    )


def _check_shapes(
    where: object,
    found: Mapping[str, torch.Size],
    wanted: Mapping[str, torch.Size],
    advice: str,
) -> None:
    if missing := wanted.keys() - found.keys():
        problem = f"{len(missing)} of {len(wanted)} tensors are missing: {few(missing)}"
    elif extra := found.keys() - wanted.keys():
        problem = f"unexpected tensors: {few(extra)}"
    elif wrong := [name for name, shape in wanted.items() if found[name] != shape]:
        shown = [f"{name} {[*found[name]]} (wanted {[*wanted[name]]})" for name in wrong]
        problem = f"shapes differ from the config: {few(shown)}"
    else:
        return
    raise ValueError(f"{where}: {problem}; {advice}")


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


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
