"""Configs in every published spelling, and refusals of all other configs."""

import dataclasses
import json
import math
from typing import Any

import pytest

from llama32.config import LlamaConfig, RopeScaling
from tests.checkpoints import tiny_config

SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA3 = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_1B = SHARED | {
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA3 | {"factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA_3B_INSTRUCT = LLAMA_1B | {
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
LLAMA_31_8B = SHARED | {
    "eos_token_id": 128001,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rope_scaling": LLAMA3 | {"factor": 8.0},
    "tie_word_embeddings": False,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
META_1B = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
META_3B = META_1B | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0}
META_31_8B = META_1B | {
    "dim": 4096,
    "n_layers": 32,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
}


def from_meta(data: dict[str, Any], **changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {"vocab_size": 128256, "tied": True, "rope_factor": None}
    return LlamaConfig.from_meta(data, **(options | changes))


def version_5(data: dict[str, Any]) -> dict[str, Any]:
    """Return the same config in the spelling of transformers 5."""
    data = dict(data)
    theta, scaling = data.pop("rope_theta"), data.pop("rope_scaling")
    data["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    data["dtype"] = data.pop("torch_dtype")
    return data


def test_every_field_of_the_published_1b_config():
    assert LlamaConfig.from_hub(LLAMA_1B) == LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_ids=(128001,),
        dtype="bfloat16",
    )


def test_eos_token_id_may_be_a_list():
    config = LlamaConfig.from_hub(LLAMA_3B_INSTRUCT)
    assert config.eos_token_ids == (128001, 128008, 128009)


def test_head_dim_defaults_to_the_width_per_head():
    assert LlamaConfig.from_hub(LLAMA_31_8B).head_dim == 128


def test_key_heads_default_to_the_number_of_query_heads():
    config = LlamaConfig.from_hub(LLAMA_2_7B)
    assert (config.num_key_value_heads, config.rope_theta) == (32, 10000.0)


def test_an_integer_rope_theta_becomes_a_float():
    config = LlamaConfig.from_hub(SMOLLM2_135M)
    assert (config.rope_theta, config.rope_scaling) == (100000.0, None)
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize("data", [LLAMA_1B, LLAMA_3B_INSTRUCT, LLAMA_31_8B, SMOLLM2_135M])
def test_both_spellings_of_transformers_give_the_same_config(data):
    assert LlamaConfig.from_hub(version_5(data)) == LlamaConfig.from_hub(data)


def test_a_file_in_both_spellings_at_once_is_read():
    both = LLAMA_1B | version_5(LLAMA_1B)
    assert LlamaConfig.from_hub(both) == LlamaConfig.from_hub(LLAMA_1B)


def test_the_older_spelling_of_the_rope_type_is_read():
    scaling = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    old = LLAMA_1B | {"rope_scaling": scaling | {"factor": 32.0}}
    assert LlamaConfig.from_hub(old) == LlamaConfig.from_hub(LLAMA_1B)


def test_null_counts_as_absent():
    nulls = {"head_dim": None, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    config = LlamaConfig.from_hub(LLAMA_1B | nulls | {"quantization_config": None})
    assert (config.head_dim, config.eos_token_ids, config.bos_token_id) == (64, (), None)


@pytest.mark.parametrize(("params", "hub"), [(META_1B, LLAMA_1B), (META_3B, LLAMA_3B_INSTRUCT)])
def test_metas_params_of_3_2_give_the_hubs_config(params, hub):
    expected = LlamaConfig.from_hub(hub)
    absent: dict[str, Any] = {"bos_token_id": None, "eos_token_ids": (), "dtype": None}
    assert from_meta(params) == dataclasses.replace(expected, **absent)


@pytest.mark.parametrize(
    ("params", "rope_factor", "expected"),
    [
        (META_1B, None, 32.0),
        (META_3B, None, 32.0),
        (META_31_8B, None, 8.0),
        (META_31_8B, 32.0, 32.0),
        (META_1B, 8.0, 8.0),
    ],
)
def test_the_rope_factor_of_meta_defaults_by_shape(params, rope_factor, expected):
    scaling = from_meta(params, rope_factor=rope_factor).rope_scaling
    assert scaling is not None
    assert scaling.factor == expected


def test_meta_without_scaled_rope_has_a_shorter_context():
    params = {key: value for key, value in META_1B.items() if key != "use_scaled_rope"}
    config = from_meta(params)
    assert (config.rope_scaling, config.max_position_embeddings) == (None, 8192)


def test_metas_mlp_size_follows_metas_formula():
    assert from_meta(META_31_8B).intermediate_size == 14336
    stories = {"dim": 64, "n_layers": 5, "n_heads": 8, "multiple_of": 4, "norm_eps": 1e-5}
    assert from_meta(stories).intermediate_size == 172


def test_metas_vocabulary_size_and_tied_embeddings_are_arguments():
    config = from_meta(META_1B | {"vocab_size": -1}, vocab_size=99, tied=False)
    assert (config.vocab_size, config.tie_word_embeddings) == (99, False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_scaling": None}, {"eos_token_ids": ()}, {"eos_token_ids": (5,)}, {"dtype": None}],
)
def test_to_hub_and_from_hub_are_inverse(changes):
    config = tiny_config(**changes)
    assert LlamaConfig.from_hub(json.loads(json.dumps(config.to_hub()))) == config


@pytest.mark.parametrize("published", [LLAMA_1B, LLAMA_3B_INSTRUCT])
def test_to_hub_writes_the_values_of_the_published_file(published):
    written = LlamaConfig.from_hub(published).to_hub()
    assert {key: published[key] for key in written} == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1, "model_type": "llama"}, "unknown key surprise;"),
        ({"sliding_window": 4096, "auto_map": {}}, "unknown key auto_map, sliding_window;"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported, only 'llama' is"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias True is not supported, only False"),
        ({"rope_interleaved": True}, "rope_interleaved True is not supported"),
        (
            {"quantization_config": {"bits": 4}},
            "only weights quantized by llama32",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "hidden_size has the wrong type: '2048'"),
        ({"hidden_size": 2048.0}, "hidden_size has the wrong type: 2048.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers has the wrong type: True"),
        ({"bos_token_id": "x"}, "bos_token_id has the wrong type: 'x'"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id must be token ids, got [1, 'x']"),
        ({"eos_token_id": 1.5}, "eos_token_id has the wrong type: 1.5"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings has the wrong type: 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": LLAMA3}, "rope_scaling: factor is missing"),
        (
            {"rope_scaling": LLAMA3 | {"factor": 8.0, "beta": 1}},
            "rope_scaling: unknown key beta",
        ),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling needs factor > 0"),
        (
            {"rope_scaling": LLAMA3 | {"factor": 8, "low_freq_factor": 4}},
            "high_freq_factor > low",
        ),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0.0"),
        ({"rope_theta": math.nan}, "rope_theta must be a positive number, got nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, got inf"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
    ],
)
def test_an_unsupported_config_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match="config") as error:
        LlamaConfig.from_hub(LLAMA_1B | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_args": {}}, "params.json: unknown key moe_args"),
        ({"quantization_args": {"scheme": "int4"}}, "params.json: unknown key quantization_args"),
        ({"dim": None}, "params.json: dim is missing"),
        ({"n_heads": "32"}, "params.json: n_heads has the wrong type: '32'"),
        ({"multiple_of": 0}, "multiple_of and ffn_dim_multiplier must be positive"),
        ({"ffn_dim_multiplier": math.inf}, "multiple_of and ffn_dim_multiplier must be positive"),
    ],
)
def test_unsupported_params_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match="params") as error:
        from_meta(META_1B | changes)
    assert message in str(error.value)
