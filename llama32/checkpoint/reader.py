"""Read a checkpoint into a model.

`inspect(folder)` checks and describes a checkpoint from the headers of its files;
`read_model(folder)` returns the model.
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

from llama32.checkpoint.checks import FLOAT_DTYPES, check_dtypes, check_shapes, dtype_name
from llama32.checkpoint.layouts import (
    HUB_FILE,
    HUB_INDEX,
    META_FILES,
    TENSOR_SUFFIXES,
    Layout,
    empty_model,
    name_map,
    named_tensors,
    open_hub,
    open_meta,
    tensor_shapes,
)
from llama32.checkpoint.tensor_files import MappedFiles, StoredTensor, summarize
from llama32.config import LlamaConfig
from llama32.model import Llama
from llama32.quantization.quantized_linear import LinearLayer, QuantizedLinear
from llama32.quantization.tied_embedding import QuantizedEmbedding, StoredEmbedding, is_tied

logger = logging.getLogger(__name__)

IGNORED_TENSORS = ("rotary_emb.inv_freq", "rope.freqs")  # constants in old exports
UNTIED_WARNING = (
    "config.json ties lm_head to the embedding, but both are stored and differ; both are used "
    "(set tie_word_embeddings to false to silence this)"
)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint folder, checked against the config. No weight has been read."""

    folder: Path
    layout: Layout
    config: LlamaConfig
    tensors: Mapping[str, StoredTensor]  # by the model's names, without a tied lm_head

    @property
    def files(self) -> list[Path]:
        return sorted({file for tensor in self.tensors.values() for file in tensor.files})

    @property
    def num_parameters(self) -> int:
        plain = dataclasses.replace(self.config, quantization=None)
        return sum(shape.numel() for shape in tensor_shapes(plain).values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most stored weights, or of the activations of a quantized model."""
        if self.config.quantization is not None:
            return self.tensors["norm.weight"].dtype
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.shape.numel()
        return sizes.most_common(1)[0][0]

    def __str__(self) -> str:
        owner = "the Hub's" if self.layout == "hub" else "Meta's"
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        embeddings = "tied" if self.config.tie_word_embeddings else "untied"
        scaling = self.config.rope_scaling
        kind = self.config.quantization or dtype_name(self.dtype)
        return (
            f"{self.folder}: {owner} layout, {files}, {self.nbytes / 1e6:,.1f} MB; "
            f"{self.num_parameters:,} parameters in {kind}, {embeddings} "
            f"embeddings, RoPE {f'slowed by {scaling.factor:g}' if scaling else 'without scaling'}"
        )


def inspect(folder: str | Path, *, rope_factor: float | None = None) -> Checkpoint:
    """Detect the layout of a folder; check all names, shapes and dtypes against the config.

    `rope_factor` is for Meta's layout, which does not store the factor (`LlamaConfig.from_meta`).
    A stored lm_head equal to a tied embedding is dropped. If the config ties the two weights but
    the stored values differ, both are used, as in transformers; in the Hub's layout with a warning.
    Raises ValueError or FileNotFoundError, with a message of one line.
    """
    folder, layout = _find_layout(Path(folder))
    if layout == "meta":
        config, stored = open_meta(folder, rope_factor)
    elif rope_factor is None:
        config, stored = open_hub(folder)
    else:
        raise ValueError(
            f"{folder}: rope_factor is for Meta's layout; in the Hub's, config.json has the factor"
        )
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED_TENSORS)}
    file_names = name_map(layout, config.num_hidden_layers, TENSOR_SUFFIXES)
    empty_tensors = named_tensors(empty_model(config))
    dtypes = {file_names[name]: tensor.dtype for name, tensor in empty_tensors.items()}
    check_dtypes(folder, stored, dtypes)
    embed = stored.get(file_names["embed.weight"])
    lm_head = stored.get(file_names["lm_head.weight"])
    if config.tie_word_embeddings and embed and lm_head:
        if embed.dtype == lm_head.dtype and torch.equal(embed.read(), lm_head.read()):
            del stored[lm_head.name]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
            if layout == "hub":
                warnings.warn(f"{folder}: {UNTIED_WARNING}", stacklevel=2)
    expected = {file_names[name]: shape for name, shape in tensor_shapes(config).items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(folder, shapes, expected, "only complete Llamas without biases or adapters load")
    tensors = {ours: stored[name] for ours, name in file_names.items() if name in stored}
    return Checkpoint(folder, layout, config, tensors)


def read_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_layer: Callable[[Llama, str], None] | None = None,
) -> Llama:
    """Read a model of either layout, in the stored dtype unless `dtype` is given.

    Memory peaks at the weights plus the largest tensor: each weight goes from the mapped file
    straight to the device. Weights are copied even on a CPU. The copy costs 0.2 s per GB once, but
    matrix products with mapped weights are always 10% slower, and a change or truncation of a
    mapped file changes the weights or kills the process. Warns of NaN and infinity, a check that
    takes 0.04 s per GB.

    `on_progress(done, total)` counts the bytes read. `on_layer(model, name)` is called for each
    linear layer once the weight is loaded, and may replace the layer; the complete model is then
    never in memory in the stored form. If a replacement unties embedding and head, the embedding
    reads rows from the file at every lookup: the file must not be overwritten while the model is in
    use (replacing the file is safe). Logs a description of the checkpoint at level INFO. Raises
    ValueError or FileNotFoundError, with a message of one line, for bad files.
    """
    if dtype not in (None, *FLOAT_DTYPES):
        allowed = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise ValueError(f"dtype {dtype}: weights load in {allowed}")
    checkpoint = inspect(path, rope_factor=rope_factor)
    logger.info("%s", checkpoint)
    dtype = dtype or checkpoint.dtype
    model = empty_model(checkpoint.config, dtype)
    files = MappedFiles(budget=checkpoint.nbytes // 32)  # costs 3% memory, maps files 32 times
    done, total, broken = 0, checkpoint.nbytes, []
    for layer, names in groupby(checkpoint.tensors, key=lambda name: name.rpartition(".")[0]):
        for name in names:
            stored = checkpoint.tensors[name]
            tensor = _load_tensor(stored, files, device, dtype)
            if tensor.dtype in FLOAT_DTYPES and not torch.stack(tensor.aminmax()).isfinite().all():
                broken.append(stored.name)
            _assign(model, name, tensor)
            done += stored.nbytes
        del tensor
        if on_layer is not None:
            _call_on_layer(model, layer, on_layer, checkpoint.tensors)
        if on_progress is not None:
            on_progress(done, total)
    if broken:
        warnings.warn(f"{path}: NaN or infinity in {summarize(broken)}", stacklevel=2)
    return model.to(device)  # moves inv_freq; the weights are there already


def _load_tensor(
    stored: StoredTensor, files: MappedFiles, device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a tensor on the device: float weights in `dtype`, other tensors as stored."""
    is_cast = stored.name.endswith(".weight") and stored.dtype in FLOAT_DTYPES
    tensor = torch.empty(stored.shape, dtype=dtype if is_cast else stored.dtype, device=device)
    stored.copy_to(tensor, files)
    return tensor


def _assign(model: Llama, name: str, tensor: Tensor) -> None:
    """Put a tensor into its module, and a tied embedding into lm_head as well."""
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


def _call_on_layer(
    model: Llama,
    layer: str,
    on_layer: Callable[[Llama, str], None],
    stored: Mapping[str, StoredTensor],
) -> None:
    """Call `on_layer` for a linear layer with a loaded weight.

    If the call unties the embedding, the embedding then reads rows from the file, except on CUDA.
    """
    was_tied = is_tied(model)
    if layer == "embed" and was_tied:
        layer = "lm_head"
    if not isinstance(model.get_submodule(layer), LinearLayer):
        return
    on_layer(model, layer)
    if was_tied and not is_tied(model) and model.norm.weight.device.type != "cuda":
        model.set_submodule("embed", _embedding_in_file(model.embed, stored))


def _embedding_in_file(embed: nn.Module, stored: Mapping[str, StoredTensor]) -> nn.Module:
    """Return an embedding that reads rows from the file, or `embed` if rows cannot be read."""
    tensors = [tensor for name, tensor in stored.items() if name.startswith("embed.")]
    rows = [opened for tensor in tensors if (opened := tensor.open_rows()) is not None]
    if len(rows) < len(tensors):
        return embed
    if isinstance(embed, nn.Embedding):
        return StoredEmbedding(rows, lambda vectors: vectors, embed.weight.dtype)
    assert isinstance(embed, QuantizedEmbedding)
    layer_type = type(embed.layer)  # several tensors: stored quantized; one: stored as floats
    layer = layer_type if len(rows) > 1 else layer_type.from_float
    return StoredEmbedding(rows, lambda *parts: layer(*parts).dequantized(), embed.like.dtype)


def _find_layout(folder: Path) -> tuple[Path, Layout]:
    """Return the folder of the weights (`folder` or "original" inside) and the layout."""
    if not folder.is_dir():
        problem = "a file; give the folder of the file" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {problem}")
    if (folder / HUB_FILE).is_file() or (folder / HUB_INDEX).is_file():
        return folder, "hub"
    for candidate in (folder, folder / "original"):
        if (candidate / "params.json").is_file() and any(candidate.glob(META_FILES)):
            return candidate, "meta"
    raise FileNotFoundError(
        f"{folder}: no checkpoint here; looked for {HUB_FILE}, {HUB_INDEX}, and params.json with "
        f"{META_FILES} (also in original/)"
    )
