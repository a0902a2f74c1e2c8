"""Files to model.

`inspect(folder)` tells what a folder holds, from its headers alone; `load_model(folder)` makes it
an nn.Module.
"""

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from llama32.adapt.quantized import Layer, QuantizedLinear
from llama32.adapt.tied import QuantizedEmbedding, StoredEmbedding, is_tied
from llama32.config import LlamaConfig
from llama32.layouts import (
    HUB_FILE,
    HUB_INDEX,
    META_FILES,
    PARTS,
    Layout,
    names,
    open_hub,
    open_meta,
    shapes,
    skeleton,
    tensors,
)
from llama32.model import Llama
from llama32.stored import MappedFiles, StoredTensor, few

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
        plain = dataclasses.replace(self.config, quantization=None)
        return sum(shape.numel() for shape in shapes(plain).values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are stored in; what a quantized model computes in."""
        if self.config.quantization is not None:
            return self.tensors["norm.weight"].dtype
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.shape.numel()
        return sizes.most_common(1)[0][0]

    def __str__(self) -> str:
        whose = "the Hub's" if self.layout == "hub" else "Meta's"
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        embeddings = "tied" if self.config.tie_word_embeddings else "untied"
        bend = self.config.rope_scaling
        kind = self.config.quantization or spelled(self.dtype)
        return (
            f"{self.folder}: {whose} layout, {files}, {self.nbytes / 1e6:,.1f} MB; "
            f"{self.num_parameters:,} parameters in {kind}, {embeddings} "
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
    theirs = names(layout, config.num_hidden_layers, PARTS)
    dtypes = {theirs[name]: tensor.dtype for name, tensor in tensors(skeleton(config)).items()}
    _check_dtypes(folder, stored, dtypes)
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
    check_shapes(folder, found, wanted, "only complete Llamas without biases or adapters load")
    mine = {ours: stored[name] for ours, name in theirs.items() if name in stored}
    return Checkpoint(folder, layout, config, mine)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_layer: Callable[[Llama, str], None] | None = None,
) -> Llama:
    """The model in a folder, in either layout, as it is stored unless `dtype` says otherwise.

    Each weight goes from the mapped file straight to its place, so memory peaks at the weights
    plus the largest tensor. It is copied there even on a CPU that could compute on the mapping:
    that costs 0.2 s per GB once, but products with mapped weights are 10% slower every time, and
    a file that is changed or cut while it is mapped changes or kills the process. NaN and infinity
    are warned of; to look for them costs 0.04 s per GB. `on_progress(done, total)` counts the bytes
    read. `on_layer(model, name)` is called for each linear layer as soon as its weight is there,
    and may put another in its place: then the model is never in memory as it is stored. If that
    unties the embedding from the head, its rows are read from the file when they are looked up, so
    the file must not be overwritten while the model is in use (it may be replaced). What was found
    is logged at level INFO. Whatever is wrong with the files is a ValueError or a
    FileNotFoundError of one line.
    """
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype {dtype}: weights load in {', '.join(map(spelled, FLOATS))}")
    found = inspect(path, rope_factor=rope_factor)
    logger.info("%s", found)
    dtype = dtype or found.dtype
    model = skeleton(found.config, dtype)
    files = MappedFiles(budget=found.nbytes // 32)  # so much more, for mapping anew as often
    done, total, broken = 0, found.nbytes, []
    for layer, parts in groupby(found.tensors, key=lambda name: name.rpartition(".")[0]):
        for name in parts:
            stored = found.tensors[name]
            tensor = _read(stored, files, device, dtype)
            if tensor.dtype in FLOATS and not torch.stack(tensor.aminmax()).isfinite().all():
                broken.append(stored.name)
            _place(model, name, tensor)
            done += stored.nbytes
        del tensor
        if on_layer is not None:
            _offer(model, layer, on_layer, found.tensors)
        if on_progress is not None:
            on_progress(done, total)
    if broken:
        warnings.warn(f"{path}: NaN or infinity in {few(broken)}", stacklevel=2)
    return model.to(device)  # the weights are there already; this takes the rotary speeds along


def _read(
    stored: StoredTensor, files: MappedFiles, device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """Weights and norms in `dtype`; what a quantized weight consists of as it is."""
    is_cast = stored.name.endswith(".weight") and stored.dtype in FLOATS
    tensor = torch.empty(stored.shape, dtype=dtype if is_cast else stored.dtype, device=device)
    stored.copy_to(tensor, files)
    return tensor


def _place(model: Llama, name: str, tensor: Tensor) -> None:
    """Put a tensor where its name says; what is tied to the embedding gets it, too."""
    layer, _, part = name.rpartition(".")
    module = model.get_submodule(layer)
    if isinstance(module, QuantizedEmbedding):
        module = module.layer
    if isinstance(module, QuantizedLinear):
        setattr(module, part, tensor)
        return
    module.weight = nn.Parameter(tensor)
    if layer == "embed" and model.config.tie_word_embeddings:
        model.lm_head.weight = module.weight


def _offer(
    model: Llama,
    layer: str,
    on_layer: Callable[[Llama, str], None],
    stored: Mapping[str, StoredTensor],
) -> None:
    """A linear layer whose weight is there, for another to be put in its place."""
    was_tied = is_tied(model)
    if layer == "embed" and was_tied:
        layer = "lm_head"
    if not isinstance(model.get_submodule(layer), Layer):
        return
    on_layer(model, layer)
    if was_tied and not is_tied(model) and model.norm.weight.device.type != "cuda":
        model.set_submodule("embed", _in_file(model.embed, stored))


def _in_file(embed: nn.Module, stored: Mapping[str, StoredTensor]) -> nn.Module:
    """The same embedding without its tensors, where they lie in a file row by row."""
    parts = [tensor.rows() for name, tensor in stored.items() if name.startswith("embed.")]
    rows = [part for part in parts if part is not None]
    if len(rows) < len(parts):
        return embed
    if isinstance(embed, nn.Embedding):
        return StoredEmbedding(rows, lambda vectors: vectors, embed.weight.dtype)
    assert isinstance(embed, QuantizedEmbedding)
    form = type(embed.layer)
    layer = form if len(rows) > 1 else form.of  # of the parts of one, or of floats to be rounded
    return StoredEmbedding(rows, lambda *parts: layer(*parts).dequantized(), embed.like.dtype)


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


def _check_dtypes(
    folder: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.dtype]
) -> None:
    """Floats of any kind where floats are wanted, and just those few bits where such are."""
    few_bits = {name: dtype for name, dtype in wanted.items() if dtype not in FLOATS}
    for name, tensor in stored.items():
        if name in few_bits and tensor.dtype != few_bits[name]:
            kinds = f"{spelled(tensor.dtype)}, but config.json says {spelled(few_bits[name])}"
            raise ValueError(f"{folder}: {name} in {kinds}")
    if odd := [n for n, x in stored.items() if n not in few_bits and x.dtype not in FLOATS]:
        kind = spelled(stored[odd[0]].dtype)
        raise ValueError(f"{folder}: {few(odd)} in {kind}; only float weights load")


def check_shapes(
    where: object,
    found: Mapping[str, torch.Size],
    wanted: Mapping[str, torch.Size],
    advice: str,
) -> None:
    """ValueError, with the advice, where tensors are missing, too many, or of other shapes."""
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


def spelled(dtype: torch.dtype) -> str:
    """As config.json writes it."""
    return str(dtype).removeprefix("torch.")
