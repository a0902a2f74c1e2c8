"""Small models with random weights, and checkpoints of them in Meta's layout."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama32.checkpoint.layouts import name_map
from llama32.config import LlamaConfig, RopeScaling
from llama32.model import Llama

LLAMA3 = RopeScaling(
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
# `rope_parameters` of transformers: LLAMA3, and no scaling.
HUB_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, **asdict(LLAMA3)}
HUB_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def tiny_config(**changes: Any) -> LlamaConfig:
    """Return the config of a tiny Llama 3.2, in which sizes that could be confused differ."""
    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2, 3),
        "dtype": "float32",
    }
    return LlamaConfig(**(sizes | changes))


def random_model(config: LlamaConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Llama:
    """Return a model with widely spread logits and with norms other than ones."""
    draw = torch.Generator().manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=draw)
            else:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5, generator=draw)
    return model.to(dtype)


def first_layers(model: Llama, count: int) -> Llama:
    """Return the model of the first layers, which often predicts the same tokens."""
    config = replace(model.config, num_hidden_layers=count)
    short = Llama(config).to(model.norm.weight.dtype)
    weights = model.state_dict()
    short.load_state_dict({name: weights[name] for name in short.state_dict()})
    return short


def write_meta(
    model: Llama,
    folder: Path,
    *,
    num_shards: int = 1,
    embed_axis: int = 0,
    output: bool | None = None,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> Path:
    """Write a model in Meta's layout, in model-parallel shards.

    The embedding is split along `embed_axis`. `output` says whether to write lm_head; None writes
    an untied lm_head. `change` may damage the tensors of each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(meta_params(model.config)))
    weights = dict(model.named_parameters(remove_duplicate=False))
    if output is False or (output is None and model.config.tie_word_embeddings):
        del weights["lm_head.weight"]
    meta = name_map("meta", model.config.num_hidden_layers)
    for shard in range(num_shards):
        tensors = {}
        for name, weight in weights.items():
            tensor = weight.detach()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = interleave_rows(tensor, model.config.head_dim)
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            axis = embed_axis if name == "embed.weight" else axis
            if tensor.ndim == 2:
                tensor = tensor.chunk(num_shards, axis)[shard]
            tensors[meta[name]] = tensor.clone()
        change(tensors)
        torch.save(tensors, folder / f"consolidated.{shard:02}.pth")
    return folder


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """Return the content of params.json for a config with an mlp size that Meta can express."""
    mlp = config.intermediate_size
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": -1,
        "ffn_dim_multiplier": mlp / int(2 * 4 * config.hidden_size / 3),
        "multiple_of": mlp,  # absorbs the rounding of the line above
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_position_embeddings,
        "use_scaled_rope": config.rope_scaling is not None,
    }


def interleave_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Permute the rows of each head from the Hub's order to Meta's: 0, R, 1, R + 1, ..."""
    R = head_dim // 2
    order = torch.stack((torch.arange(R), torch.arange(R) + R), dim=1).flatten()
    return weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Apply `change` to the tensors of model.safetensors; return the folder."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return folder


def edit_json(file: Path, **changes: Any) -> Path:
    """Change keys of a JSON file; return the folder of the file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file.parent
