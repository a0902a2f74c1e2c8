"""Layouts of checkpoint files: the Hub's and Meta's, with a table of weight names.

The two rows of rotary pair r of a q or k head are adjacent in Meta's layout (rows 2 * r and
2 * r + 1) and R rows apart in the Hub's layout (rows r and R + r, for R pairs).
`StoredTensor.copy_to` in `tensor_files.py` permutes the rows.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama32.checkpoint.tensor_files import StoredTensor, map_tensors, summarize
from llama32.config import LlamaConfig
from llama32.json_files import read_json
from llama32.model import Llama
from llama32.quantization.quantize import quantize

Layout = Literal["hub", "meta"]

HUB_FILE = "model.safetensors"
HUB_INDEX = "model.safetensors.index.json"
META_FILES = "consolidated.*.pth"
COMPANION_FILES = (  # tokenizer, chat template and sampling settings in the Hub's layout
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Name(NamedTuple):
    """Our name of a module, the Hub's and Meta's; {} stands for the layer number."""

    ours: str
    hub: str
    meta: str


NAME_TABLE = (
    Name("embed", "model.embed_tokens", "tok_embeddings"),
    Name("layers.{}.attn_norm", "model.layers.{}.input_layernorm", "layers.{}.attention_norm"),
    Name("layers.{}.attn.q_proj", "model.layers.{}.self_attn.q_proj", "layers.{}.attention.wq"),
    Name("layers.{}.attn.k_proj", "model.layers.{}.self_attn.k_proj", "layers.{}.attention.wk"),
    Name("layers.{}.attn.v_proj", "model.layers.{}.self_attn.v_proj", "layers.{}.attention.wv"),
    Name("layers.{}.attn.o_proj", "model.layers.{}.self_attn.o_proj", "layers.{}.attention.wo"),
    Name("layers.{}.mlp_norm", "model.layers.{}.post_attention_layernorm", "layers.{}.ffn_norm"),
    Name("layers.{}.mlp.gate_proj", "model.layers.{}.mlp.gate_proj", "layers.{}.feed_forward.w1"),
    Name("layers.{}.mlp.down_proj", "model.layers.{}.mlp.down_proj", "layers.{}.feed_forward.w2"),
    Name("layers.{}.mlp.up_proj", "model.layers.{}.mlp.up_proj", "layers.{}.feed_forward.w3"),
    Name("norm", "model.norm", "norm"),
    Name("lm_head", "lm_head", "output"),
)

# A float weight is one tensor; a quantized weight has several. Our suffix -> the Hub's.
TENSOR_SUFFIXES = {"weight": "weight", "scale": "weight_scale", "zero": "weight_zero"}


def name_map(
    layout: Layout, num_layers: int, parts: Collection[str] = ("weight",)
) -> dict[str, str]:
    """Map our tensor names to the names in a layout; tensors of one module are consecutive."""
    names = [(name.ours, getattr(name, layout)) for name in NAME_TABLE]
    return {
        f"{ours.format(layer)}.{part}": f"{theirs.format(layer)}.{TENSOR_SUFFIXES[part]}"
        for ours, theirs in names
        for layer in range(num_layers if "{}" in ours else 1)
        for part in parts
    }


class SkipInit(TorchFunctionMode):
    """A mode of PyTorch that skips the random initialization of embeddings.

    A meta tensor has no memory to initialize, but PyTorch imports its compiler before noticing,
    which takes a second.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def empty_model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """Return a model on the meta device, quantized as the config says.

    Only `norm` gets `dtype`: code that replaces layers reads the dtype of activations from `norm`.
    """
    with torch.device("meta"), SkipInit():
        model = Llama(config)
    model.norm.to(dtype)
    return model if config.quantization is None else quantize(model, config.quantization)


def named_tensors(model: Llama) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name; a tied lm_head is listed as the embedding."""
    persistent = model.state_dict().keys()
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {
        name.replace("embed.layer.", "embed."): tensor
        for name, tensor in tensors
        if name in persistent
    }


def tensor_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor in a checkpoint with the given config."""
    return {name: tensor.shape for name, tensor in named_tensors(empty_model(config)).items()}


def open_hub(folder: Path) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Open the Hub's layout: config.json, and one safetensors file or several with an index.

    Raises ValueError or FileNotFoundError if the index and the files do not match.
    """
    config = LlamaConfig.from_hub(read_json(folder / "config.json"))
    tensors = {}
    for file, listed in _hub_files(folder).items():
        mapped = map_tensors(file)
        for name in mapped if listed is None else listed:
            if name not in mapped:
                raise ValueError(f"{folder / HUB_INDEX}: lists {name}, which is not in {file.name}")
            tensors[name] = StoredTensor(name, (file,), mapped[name].shape, mapped[name].dtype)
    return config, tensors


def _hub_files(folder: Path) -> dict[Path, list[str] | None]:
    """Return each safetensors file with the tensors listed in the index; None means all tensors."""
    if (folder / HUB_FILE).is_file():
        return {folder / HUB_FILE: None}
    index = folder / HUB_INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must name a file for each tensor")
    files: dict[Path, list[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r} is not a safetensors file in the same folder")
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file}: missing, but {HUB_INDEX} names the file; download it"
            )
        files[folder / file] = [name for name in weight_map if weight_map[name] == file]
    return files


def open_meta(
    folder: Path, rope_factor: float | None
) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Open Meta's layout: params.json, and one or more model-parallel consolidated.NN.pth files.

    The files do not say whether lm_head is tied: the returned config says tied, and `inspect`
    changes the config to untied if `output` differs from the embedding. Raises ValueError or
    FileNotFoundError for damaged or missing shards.
    """
    params = read_json(folder / "params.json")
    shards = _meta_shards(folder)
    files = tuple(shards)
    embed = shards[files[0]].get("tok_embeddings.weight")
    if embed is None or embed.ndim != 2:
        raise ValueError(f"{files[0]}: has no matrix tok_embeddings.weight; is this a Llama?")
    is_split_by_vocabulary = embed.shape[1] == params.get("dim")
    config = LlamaConfig.from_meta(
        params,
        vocab_size=embed.shape[0] * (len(files) if is_split_by_vocabulary else 1),
        tied=True,
        rope_factor=rope_factor,
    )
    meta_names = name_map("meta", config.num_hidden_layers)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    whole = {meta_names[name]: shape for name, shape in tensor_shapes(untied).items()}
    tensors = {}
    for name in shards[files[0]]:
        pieces = [shard[name] for shard in shards.values()]
        stored = _join_shards(name, files, pieces, whole.get(name))
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):  # `copy_to` permutes
            stored = dataclasses.replace(stored, interleaved_pairs=config.head_dim // 2)
        tensors[name] = stored
    return config, tensors


def _meta_shards(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """Memory-map the tensors of every shard file, in the order of the shards."""
    files = sorted(folder.glob(META_FILES))
    shards = {}
    for number, file in enumerate(files):
        expected = folder / f"consolidated.{number:02}.pth"
        if file != expected:
            raise FileNotFoundError(f"{expected}: missing, but {file.name} exists; download it")
        shards[file] = map_tensors(file)
        if odd := shards[file].keys() ^ shards[files[0]].keys():
            raise ValueError(f"{file}: tensor names differ from {files[0].name}: {summarize(odd)}")
    return shards


def _join_shards(
    name: str, files: tuple[Path, ...], pieces: Sequence[Tensor], whole: torch.Size | None
) -> StoredTensor:
    """Describe a tensor across shards: Meta splits matrices by rows or columns and copies norms.

    The split axis is not stored; on the split axis the shard sizes add up to the whole size.
    """
    first = pieces[0]
    if any(piece.shape != first.shape or piece.dtype != first.dtype for piece in pieces):
        raise ValueError(f"{files[0].parent}: {name} differs in shape or dtype between the shards")
    for axis, (part, size) in enumerate(zip(first.shape, whole or (), strict=False)):
        if part * len(files) == size:
            shape = [*first.shape]
            shape[axis] = size
            return StoredTensor(name, files, torch.Size(shape), first.dtype, axis)
    return StoredTensor(name, files[:1], first.shape, first.dtype)
