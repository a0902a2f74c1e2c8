"""GGUF writer: a checkpoint for llama.cpp, to benchmark on the same weights.

For benchmarks only: the file has no tokenizer, so llama.cpp takes token ids and returns logits.
"""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from llama32.checkpoint.reader import inspect
from llama32.config import LlamaConfig
from llama32.rope import compute_inv_freq

GGUF_NAMES = {  # by the names in `Llama`
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
    """Write matrices in a GGUF type (BF16, Q8_0, ...) and norms in fp32.

    Weights pass through memory one by one.
    """
    checkpoint = inspect(folder)
    writer = gguf.GGUFWriter(file, "llama")
    write_metadata(writer, checkpoint.config)
    factors = rope_factors(checkpoint.config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, stored in checkpoint.tensors.items():
        raw = Type[kind] if len(stored.shape) == 2 else Type.F32
        size, nbytes = gguf.GGML_QUANT_SIZES[raw]
        shape = gguf.quant_shape_to_byte_shape(tuple(stored.shape), raw)
        length = stored.shape.numel() // size * nbytes
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.uint8), length, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, stored in checkpoint.tensors.items():
        weight = stored.read()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = permute(weight, checkpoint.config.head_dim)
        writer.write_tensor_data(encode(weight, Type[kind] if weight.ndim == 2 else Type.F32))
    writer.close()


def encode(weight: Tensor, kind: Type) -> np.ndarray:
    """Convert a tensor to the bytes of a GGUF type."""
    if kind is Type.BF16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(weight.float().numpy(), kind)


def permute(weight: Tensor, head_dim: int) -> Tensor:
    """Permute rows to make rotary pairs adjacent, the order of llama.cpp and Meta."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """Map a tensor name: layers.3.attn.q_proj.weight becomes blk.3.attn_q.weight."""
    *path, leaf, _ = name.split(".")
    block = f"blk.{path[1]}." if path else ""
    return f"{block}{GGUF_NAMES[leaf]}.weight"


def write_metadata(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Add the sizes and constants of the model to the header."""
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
    """Return the divisor of each rotary frequency for long context; None without RoPE scaling."""
    if config.rope_scaling is None:
        return None
    unscaled = dataclasses.replace(config, rope_scaling=None)
    return (compute_inv_freq(unscaled) / compute_inv_freq(config)).numpy()
