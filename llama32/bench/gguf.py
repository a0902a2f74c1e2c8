"""A checkpoint as a GGUF file, so that llama.cpp can be measured on the same weights.

For measuring only: the tokenizer is left out, so llama.cpp takes ids and gives logits.
"""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from llama32.checkpoint import inspect
from llama32.config import LlamaConfig
from llama32.rope import rotary_speeds

NAMES = {  # ours, and GGUF's
    "embed": "token_embd",
    "attn_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(folder: Path, file: Path, kind: str = "BF16") -> None:
    """Matrices in the type of that name (BF16, Q8_0, ...), norms in fp32. The weights pass through
    memory one by one."""
    found = inspect(folder)
    writer = gguf.GGUFWriter(file, "llama")
    describe(writer, found.config)
    bend = rope_factors(found.config)
    if bend is not None:
        writer.add_tensor_info("rope_freqs.weight", bend.shape, bend.dtype, bend.nbytes)
    for name, stored in found.tensors.items():
        raw = Type[kind] if len(stored.shape) == 2 else Type.F32
        size, nbytes = gguf.GGML_QUANT_SIZES[raw]
        shape = gguf.quant_shape_to_byte_shape(tuple(stored.shape), raw)
        length = stored.shape.numel() // size * nbytes
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.uint8), length, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if bend is not None:
        writer.write_tensor_data(bend)
    for name, stored in found.tensors.items():
        weight = stored.read()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, found.config.head_dim)
        writer.write_tensor_data(encoded(weight, Type[kind] if weight.ndim == 2 else Type.F32))
    writer.close()


def encoded(weight: Tensor, kind: Type) -> np.ndarray:
    """As bytes of that type."""
    if kind is Type.BF16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(weight.float().numpy(), kind)


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a rotary pair side by side, as llama.cpp turns them (and Meta)."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """layers.3.attn.q_proj.weight is blk.3.attn_q.weight."""
    *path, leaf, _ = name.split(".")
    block = f"blk.{path[1]}." if path else ""
    return f"{block}{NAMES[leaf]}.weight"


def describe(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """What llama.cpp has to know of the model."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")


def rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """By how much each rotary pair is slowed for long context; None where none is."""
    if config.rope_scaling is None:
        return None
    plain = dataclasses.replace(config, rope_scaling=None)
    return (rotary_speeds(plain) / rotary_speeds(config)).numpy()
