"""GGUF files for llama.cpp hold the weights and sizes of the checkpoint."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from llama32.bench.backends import LlamaCppBackend  # noqa: E402
from llama32.bench.gguf_writer import write_gguf  # noqa: E402
from llama32.checkpoint.writer import save  # noqa: E402
from llama32.model import Llama  # noqa: E402
from tests.checkpoints import random_model, tiny_config  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 96}


def written(tmp_path: Path, kind: str, **changes) -> tuple[Llama, dict]:
    model = random_model(tiny_config(**(SIZES | changes)))
    save(model, tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    return model, tensors | {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0), ("BF16", 2**-8), ("Q8_0", 2**-6)])
def test_every_weight_is_written_within_the_precision_of_its_type(tmp_path, kind, tolerance):
    model, found = written(tmp_path, kind, tie_word_embeddings=False)
    assert sum(name.endswith(".weight") for name in found) == 3 + 3 * 9 + 1
    modules = {
        "token_embd": model.embed,
        "output": model.lm_head,
        "output_norm": model.norm,
        "blk.2.attn_v": model.layers[2].attn.v_proj,
        "blk.0.attn_output": model.layers[0].attn.o_proj,
        "blk.1.ffn_gate": model.layers[1].mlp.gate_proj,
        "blk.1.ffn_up": model.layers[1].mlp.up_proj,
        "blk.1.ffn_down": model.layers[1].mlp.down_proj,
        "blk.2.attn_norm": model.layers[2].attn_norm,
        "blk.2.ffn_norm": model.layers[2].mlp_norm,
    }
    for name, module in modules.items():
        weight = module.weight.detach()
        error = np.abs(found[f"{name}.weight"] - weight.numpy())
        assert error.max() <= tolerance * weight.abs().max(), name


def test_rotary_pairs_are_adjacent(tmp_path):
    model, found = written(tmp_path, "F32")
    heads = model.layers[1].attn.q_proj.weight.detach().view(6, 16, 64)
    q = torch.from_numpy(np.array(found["blk.1.attn_q.weight"])).view(6, 16, 64)
    assert torch.equal(q[:, 0::2], heads[:, :8])
    assert torch.equal(q[:, 1::2], heads[:, 8:])
    k = torch.from_numpy(np.array(found["blk.1.attn_k.weight"])).view(2, 16, 64)
    assert torch.equal(k[:, 3], model.layers[1].attn.k_proj.weight.detach().view(2, 16, 64)[:, 9])


def test_metadata_holds_sizes_and_rope_scaling(tmp_path):
    model, found = written(tmp_path, "F32")
    config = model.config
    assert found["general.architecture"] == "llama"
    assert found["llama.block_count"] == 3
    assert found["llama.attention.head_count"] == 6
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.rope.freq_base"] == config.rope_theta
    factors = found["rope_freqs.weight"]
    inv_freq = 1 / config.rope_theta ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(inv_freq / torch.from_numpy(np.array(factors)), model.inv_freq)
    _, plain = written(tmp_path, "F32", rope_scaling=None)
    assert "rope_freqs.weight" not in plain


def test_llama_cpp_gets_the_same_logits(tmp_path):
    pytest.importorskip("llama_cpp")
    model, _ = written(tmp_path, "F32", num_key_value_heads=2)
    (tmp_path / "model.gguf").rename(tmp_path / "F32.gguf")
    peer = LlamaCppBackend(tmp_path, "F32")
    prompt = [5, 17, 60, 3, 42, 9]
    context = peer.make_context(1, 256)
    peer.read_prompt(context, prompt, 0)
    assert peer.argmax_token(context, -1) == model(torch.tensor([prompt]))[0, -1].argmax().item()
    assert "llama_cpp" in sys.modules
