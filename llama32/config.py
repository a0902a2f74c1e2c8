"""Sizes and constants of a checkpoint, checked and frozen.

Checkpoints use two spellings, the Hub's `config.json` and Meta's `params.json`. Both become one
`LlamaConfig` with the Hub's field names. A key that is neither used nor known to be harmless
raises ValueError, because a silently dropped key is a silently different model.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The llama3 scaling of RoPE, which extends a context of 8,192 tokens to 131,072.

    (Llama 3.1 report, section 3.4.2; `rope_scaling` in config.json)
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not self.high_freq_factor > self.low_freq_factor > 0 or not self.factor > 0:
            raise ValueError(
                "config: rope_scaling needs factor > 0 and high_freq_factor > low_freq_factor > 0, "
                f"got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of one Llama, named after the keys of the Hub's config.json."""

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D; not always hidden_size / num_attention_heads
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # any of the ids ends a text
    dtype: str | None = None  # of the stored weights, e.g. "bfloat16"
    quantization: str | None = None  # scheme of `llama32.quantize`, e.g. "int8"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"config: {field.name} must be a positive integer, got {value!r}")
            if field.type is float and not 0 < value < math.inf:
                raise ValueError(f"config: {field.name} must be a positive number, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim {self.head_dim} is odd; RoPE rotates pairs")

    @classmethod
    def from_hub(cls, data: Mapping[str, Any]) -> "LlamaConfig":
        """Read the content of a Hub `config.json` in the spelling of transformers 4 or 5."""
        keys = _Keys(data, file="config.json")
        if (name := keys.take("model_type", str, "llama")) != "llama":
            raise ValueError(f"config.json: model_type {name!r} is not supported, only 'llama' is")
        quantization = _quantization_scheme(keys.take("quantization_config", dict, None))
        for key, only in HUB_FIXED.items():
            if (value := keys.take(key, type(only), only)) != only:
                raise ValueError(f"config.json: {key} {value!r} is not supported, only {only!r}")
        heads, hidden = keys.take("num_attention_heads", int), keys.take("hidden_size", int)
        theta, scaling = _rope_from_hub(keys)
        eos = keys.take("eos_token_id", int | list, [])
        eos = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int for token in eos):
            raise ValueError(f"config.json: eos_token_id must be token ids, got {eos!r}")
        dtype, new_dtype = (keys.take(key, str, None) for key in ("torch_dtype", "dtype"))
        config = cls(
            vocab_size=keys.take("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=keys.take("intermediate_size", int),
            num_hidden_layers=keys.take("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=keys.take("num_key_value_heads", int, heads),
            head_dim=keys.take("head_dim", int, hidden // max(heads, 1)),
            max_position_embeddings=keys.take("max_position_embeddings", int),
            rms_norm_eps=keys.take("rms_norm_eps", float),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=keys.take("tie_word_embeddings", bool, False),
            bos_token_id=keys.take("bos_token_id", int, None),
            eos_token_ids=tuple(eos),
            dtype=dtype or new_dtype,  # some files have both
            quantization=quantization,
        )
        keys.reject_unknown(HUB_METADATA)
        return config

    @classmethod
    def from_meta(
        cls, data: Mapping[str, Any], *, vocab_size: int, tied: bool, rope_factor: float | None
    ) -> "LlamaConfig":
        """Read the content of Meta's `params.json`.

        The file leaves three values open. `vocab_size` may be -1 and tied embeddings are not
        mentioned: the caller takes both from the tensors. `use_scaled_rope` names no factor; a
        `rope_factor` of None means 32 for the shapes of Llama 3.2 1B and 3B, and 8 (Llama 3.1)
        for every other shape.
        """
        keys = _Keys(data, file="params.json")
        width, heads, layers = (keys.take(key, int) for key in ("dim", "n_heads", "n_layers"))
        multiple = keys.take("multiple_of", int)
        multiplier = keys.take("ffn_dim_multiplier", float, 1.0)
        if multiple < 1 or not 0 < multiplier < math.inf:
            raise ValueError("params.json: multiple_of and ffn_dim_multiplier must be positive")
        mlp = int(multiplier * int(2 * 4 * width / 3))
        is_scaled = keys.take("use_scaled_rope", bool, False)
        if rope_factor is None:
            rope_factor = 32.0 if (width, layers) in LLAMA_32_SHAPES else 8.0
        config = cls(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=multiple * math.ceil(mlp / multiple),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys.take("n_kv_heads", int, heads),
            head_dim=keys.take("head_dim", int, width // max(heads, 1)),
            max_position_embeddings=keys.take("max_seq_len", int, 131072 if is_scaled else 8192),
            rms_norm_eps=keys.take("norm_eps", float),
            rope_theta=keys.take("rope_theta", float, 10000.0),
            rope_scaling=replace(LLAMA3_ROPE_SCALING, factor=rope_factor) if is_scaled else None,
            tie_word_embeddings=tied,
        )
        keys.reject_unknown(META_METADATA)
        return config

    def to_hub(self) -> dict[str, Any]:
        """Return the content of a Hub `config.json`, in the spelling of the published files."""
        data: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        data |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        data |= asdict(self)
        if self.rope_scaling is not None:
            data["rope_scaling"]["rope_type"] = "llama3"
        eos = list(data.pop("eos_token_ids"))
        data["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        data["torch_dtype"] = data.pop("dtype")
        if (scheme := data.pop("quantization")) is not None:
            data["quantization_config"] = {"quant_method": QUANT_METHOD, "scheme": scheme}
        return data


QUANT_METHOD = "llama32"  # in config.json, marks weights from `llama32.quantize`
LLAMA3_ROPE_SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
LLAMA_32_SHAPES = {(2048, 16), (3072, 28)}  # (width, layers) of the 1B and the 3B

# The only values that `model.py` implements; a checkpoint with another value is another model.
HUB_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
# Keys without influence on the forward pass.
HUB_METADATA = (
    "_name_or_path architectures attention_dropout chunk_size_feed_forward id2label "
    "initializer_range is_encoder_decoder is_llama_config label2id max_length max_sequence_length "
    "output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache".split()
)
META_METADATA = ("max_batch_size", "model_parallel_size", "vocab_size")


def _quantization_scheme(quantization: Mapping[str, Any] | None) -> str | None:
    """Return the scheme of weights quantized by this package; ValueError for other methods."""
    if quantization is None:
        return None
    keys = _Keys(quantization, file="config.json: quantization_config")
    if keys.take("quant_method", str, "") != QUANT_METHOD:
        raise ValueError(
            f"config.json: quantization_config: only weights quantized by {QUANT_METHOD} load; "
            "use the checkpoint before quantization instead"
        )
    scheme = keys.take("scheme", str)
    keys.reject_unknown()
    return scheme


def _rope_from_hub(keys: "_Keys") -> tuple[float, RopeScaling | None]:
    """Read `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    theta = keys.take("rope_theta", float, 10000.0)
    parameters = keys.take("rope_scaling", dict, {}) | keys.take("rope_parameters", dict, {})
    rope = _Keys(parameters, file="config.json: rope_scaling")
    theta = rope.take("rope_theta", float, theta)
    legacy_type = rope.take("type", str, "default")
    rope_type = rope.take("rope_type", str, legacy_type)
    if rope_type == "default":
        rope.reject_unknown(("factor",))
        return theta, None
    if rope_type != "llama3":
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported, only 'llama3' is")
    scaling = RopeScaling(**{f.name: rope.take(f.name, f.type) for f in fields(RopeScaling)})
    rope.reject_unknown()
    return theta, scaling


class _Keys:
    """The keys of a JSON object, taken one by one with their types checked.

    null counts as absent, as in the published files.
    """

    def __init__(self, data: Mapping[str, Any], *, file: str) -> None:
        self.remaining = {key: value for key, value in data.items() if value is not None}
        self.file = file

    def take(self, key: str, expected: Any, default: Any = ...) -> Any:
        if key not in self.remaining:
            if default is ...:
                raise ValueError(f"{self.file}: {key} is missing")
            return default
        value = self.remaining.pop(key)
        if expected is float and type(value) is int:
            value = float(value)
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{self.file}: {key} has the wrong type: {value!r}")
        return value

    def reject_unknown(self, harmless: Collection[str] = ()) -> None:
        if unknown := sorted(self.remaining.keys() - set(harmless)):
            raise ValueError(
                f"{self.file}: unknown key {', '.join(unknown)}; an unknown key may change the "
                "model: remove the key only if you know that it does not"
            )
