"""How checkpoint files lay a model out: one table of names, the Hub's layout and Meta's."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama32.adapt.quantize import quantize
from llama32.config import LlamaConfig
from llama32.files import read_json
from llama32.model import Llama
from llama32.stored import StoredTensor, few, map_tensors

Layout = Literal["hub", "meta"]

HUB_FILE = "model.safetensors"
HUB_INDEX = "model.safetensors.index.json"
META_FILES = "consolidated.*.pth"
BESIDE = (  # of the Hub's layout, what tells how to use the weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Name(NamedTuple):
    """A weight as we call it, as the Hub does and as Meta does; {} is the number of its layer."""

    ours: str
    hub: str
    meta: str


NAMES = (
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


# A weight in floats is one tensor. A quantized one has others beside it, called so by the Hub.
PARTS = {"weight": "weight", "scale": "weight_scale", "zero": "weight_zero"}


def names(layout: Layout, num_layers: int, parts: Collection[str] = ("weight",)) -> dict[str, str]:
    """Our names of tensors, each with its name in a layout."""
    return {
        f"{name.ours}.{part}".format(i): f"{getattr(name, layout)}.{PARTS[part]}".format(i)
        for name in NAMES
        for i in range(num_layers if "{}" in name.ours else 1)
        for part in parts
    }


class Undrawn(TorchFunctionMode):
    """Leaves new embeddings as they are. Of a tensor without memory nothing can be drawn, but to
    find that out PyTorch imports its compiler, which takes a second."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def skeleton(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """The model without its weights, quantized as its config says. What else replaces its layers
    takes the dtype of the norm for that of the activations."""
    with torch.device("meta"), Undrawn():
        model = Llama(config)
    model.norm.to(dtype)
    return model if config.quantization is None else quantize(model, config.quantization)


def tensors(model: Llama) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name. A tied lm_head is the embedding: not named again."""
    persistent = model.state_dict().keys()
    found = (*model.named_parameters(), *model.named_buffers())
    return {
        name.replace("embed.layer.", "embed."): tensor
        for name, tensor in found
        if name in persistent
    }


def shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Of every tensor."""
    return {name: tensor.shape for name, tensor in tensors(skeleton(config)).items()}


def open_hub(folder: Path) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """The Hub's layout: config.json, and one safetensors file or several with an index."""
    config = LlamaConfig.from_hub(read_json(folder / "config.json"))
    tensors = {}
    for file, listed in _hub_files(folder).items():
        mapped = map_tensors(file)
        for name in mapped if listed is None else listed:
            if name not in mapped:
                raise ValueError(f"{folder / HUB_INDEX}: {name} is not in {file.name} as it says")
            tensors[name] = StoredTensor(name, (file,), mapped[name].shape, mapped[name].dtype)
    return config, tensors


def _hub_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files, each with the tensors to take from it: None takes all."""
    if (folder / HUB_FILE).is_file():
        return {folder / HUB_FILE: None}
    index = folder / HUB_INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(at, str) for at in places.values()):
        raise ValueError(f"{index}: weight_map must name a file for each tensor")
    files: dict[Path, list[str] | None] = {}
    for at in sorted(set(places.values())):
        if Path(at).name != at or not at.endswith(".safetensors"):
            raise ValueError(f"{index}: {at!r} is not the name of a safetensors file beside it")
        if not (folder / at).is_file():
            raise FileNotFoundError(
                f"{folder / at}: missing, but {HUB_INDEX} names it; download it"
            )
        files[folder / at] = [name for name, place in places.items() if place == at]
    return files


def open_meta(
    folder: Path, rope_factor: float | None
) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Meta's layout: params.json, and one consolidated.NN.pth or several model-parallel shards.

    Whether lm_head is tied is not said: it is, until `output` turns out to differ.
    """
    params = read_json(folder / "params.json")
    shards = _meta_shards(folder)
    files = tuple(shards)
    embed = shards[files[0]].get("tok_embeddings.weight")
    if embed is None or embed.ndim != 2:
        raise ValueError(f"{files[0]}: has no matrix tok_embeddings.weight; is this a Llama?")
    cut_along_vocabulary = embed.shape[1] == params.get("dim")
    config = LlamaConfig.from_meta(
        params,
        vocab_size=embed.shape[0] * (len(files) if cut_along_vocabulary else 1),
        tied=True,
        rope_factor=rope_factor,
    )
    theirs = names("meta", config.num_hidden_layers)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    whole = {theirs[name]: shape for name, shape in shapes(untied).items()}
    tensors = {}
    for name in shards[files[0]]:
        pieces = [shard[name] for shard in shards.values()]
        stored = _join(name, files, pieces, whole.get(name))
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            stored = dataclasses.replace(stored, pairs=config.head_dim // 2)
        tensors[name] = stored
    return config, tensors


def _meta_shards(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The mapped tensors of each shard, in the order in which the shards are joined."""
    files = sorted(folder.glob(META_FILES))
    shards = {}
    for number, file in enumerate(files):
        expected = folder / f"consolidated.{number:02}.pth"
        if file != expected:
            raise FileNotFoundError(f"{expected}: missing, but {file.name} is there; download it")
        shards[file] = map_tensors(file)
        if odd := shards[file].keys() ^ shards[files[0]].keys():
            raise ValueError(f"{file}: not the tensors of {files[0].name}: {few(odd)}")
    return shards


def _join(
    name: str, files: tuple[Path, ...], pieces: Sequence[Tensor], whole: torch.Size | None
) -> StoredTensor:
    """Meta cuts a matrix along its rows or its columns and repeats a norm; shapes tell which."""
    first = pieces[0]
    if any(piece.shape != first.shape or piece.dtype != first.dtype for piece in pieces):
        raise ValueError(f"{files[0].parent}: {name} differs in shape or dtype between the shards")
    for axis, (part, size) in enumerate(zip(first.shape, whole or (), strict=False)):
        if part * len(files) == size:
            shape = [*first.shape]
            shape[axis] = size
            return StoredTensor(name, files, torch.Size(shape), first.dtype, axis)
    return StoredTensor(name, files[:1], first.shape, first.dtype)
