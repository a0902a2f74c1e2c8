"""transformers loads our checkpoints, and we load checkpoints from transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as HubConfig

from llama32.checkpoint.layouts import name_map
from llama32.checkpoint.reader import read_model
from llama32.checkpoint.writer import save
from tests.checkpoints import HUB_LLAMA3, HUB_PLAIN, edit_json, random_model, tiny_config

TOKENS = torch.arange(160).reshape(2, 80)


def hub_model(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "initializer_range": 0.15,
        "rope_parameters": HUB_LLAMA3,
        "eos_token_id": [128001, 128008, 128009],
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(HubConfig(**(sizes | changes))).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [HUB_LLAMA3, HUB_PLAIN], ids=["llama3", "plain"])
def test_a_checkpoint_from_transformers_loads_with_the_same_weights(tmp_path, shard, tied, rope):
    theirs = hub_model(tie_word_embeddings=tied, rope_parameters=rope)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "60KB")
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    model = read_model(tmp_path)
    hub = name_map("hub", 2)
    weights = {hub[name]: weight for name, weight in model.named_parameters()}
    expected = dict(theirs.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False], ids=["llama3", "plain"])
def test_transformers_loads_our_checkpoint(tmp_path, max_shard_bytes, tied, scaled):
    changes = {} if scaled else {"rope_scaling": None}
    model = random_model(tiny_config(tie_word_embeddings=tied, **changes))
    save(model, tmp_path, max_shard_bytes=max_shard_bytes)
    loaded: Any = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    theirs, report = loaded
    assert not any(report.values())
    assert theirs.config.eos_token_id == [2, 3]
    assert theirs.config.rope_parameters["rope_theta"] == 500000.0
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


def test_a_round_trip_through_transformers_changes_no_bit(tmp_path):
    model = random_model(tiny_config(), dtype=torch.bfloat16)
    save(model, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "theirs")
    back = read_model(tmp_path / "theirs")
    assert back.config == dataclasses.replace(model.config, dtype="bfloat16")
    assert torch.equal(logits(back), logits(model))


def test_an_lm_head_unlike_the_tied_embedding_is_used_as_in_transformers(tmp_path):
    untied = random_model(tiny_config(tie_word_embeddings=False))
    save(untied, tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ties lm_head"):
        model = read_model(tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), logits(untied), atol=0, rtol=0)


@pytest.mark.parametrize("head_dim", [None, 22])
def test_head_dim_may_be_absent_or_unusual(tmp_path: Path, head_dim):
    theirs = hub_model(head_dim=head_dim)
    theirs.save_pretrained(tmp_path)
    if head_dim is None:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["head_dim"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(tmp_path)
    assert model.config.head_dim == (head_dim or 8)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
