"""What a checkpoint says about itself: sizes and constants, frozen and checked.

Two spellings exist in the wild, the Hub's `config.json` and Meta's `params.json`. Both end in
one `LlamaConfig`, whose fields carry the Hub's names. A key that is neither used nor known to be
harmless raises, because a silently dropped key is a silently different model.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The llama3 bend of RoPE, which stretches a context of 8,192 tokens to 131,072.

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
    """Sizes and constants of one Llama. Fields are the keys of the Hub's config.json."""

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
    eos_token_ids: tuple[int, ...] = ()  # any of these ends a text
    dtype: str | None = None  # what the weights are stored in, e.g. "bfloat16"
    quantization: str | None = None  # "int8", ..., where `llama32.quantize` made the weights

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
            raise ValueError(f"config: head_dim {self.head_dim} is odd; RoPE turns pairs")

    @classmethod
    def from_hub(cls, data: Mapping[str, Any]) -> "LlamaConfig":
        """Read the content of a Hub `config.json`, in the spelling of transformers 4 or 5."""
        keys = _Keys(data, file="config.json")
        if (kind := keys.take("model_type", str, "llama")) != "llama":
            raise ValueError(f"config.json: model_type {kind!r} is not supported, only 'llama' is")
        quantization = _scheme(keys.find("quantization_config", dict))
        for key, value in HUB_FIXED.items():
            if (found := keys.take(key, type(value), value)) != value:
                raise ValueError(f"config.json: {key} {found!r} is not supported, only {value!r}")
        heads, hidden = keys.take("num_attention_heads", int), keys.take("hidden_size", int)
        theta, scaling = _rope_from_hub(keys)
        eos = keys.take("eos_token_id", int | list, [])
        eos = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int for token in eos):
            raise ValueError(f"config.json: eos_token_id must be token ids, got {eos!r}")
        dtypes = keys.find("torch_dtype", str), keys.find("dtype", str)  # some files have both
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
            bos_token_id=keys.find("bos_token_id", int),
            eos_token_ids=tuple(eos),
            dtype=dtypes[0] or dtypes[1],
            quantization=quantization,
        )
        keys.refuse_leftovers(HUB_METADATA)
        return config

    @classmethod
    def from_meta(
        cls, data: Mapping[str, Any], *, vocab_size: int, tied: bool, rope_factor: float | None
    ) -> "LlamaConfig":
        """Read the content of Meta's `params.json`.

        The file leaves three things open. `vocab_size` may be -1 and `tied` is not said: both
        come from the tensors. `use_scaled_rope` does not tell its factor: `rope_factor` does, or
        None takes 32 for the shapes of Llama 3.2 1B and 3B, and 8 (Llama 3.1) for all others.
        """
        keys = _Keys(data, file="params.json")
        width, heads, layers = (keys.take(key, int) for key in ("dim", "n_heads", "n_layers"))
        multiple = keys.take("multiple_of", int)
        multiplier = keys.take("ffn_dim_multiplier", float, 1.0)
        if multiple < 1 or not 0 < multiplier < math.inf:
            raise ValueError("params.json: multiple_of and ffn_dim_multiplier must be positive")
        mlp = int(multiplier * int(2 * 4 * width / 3))
        bent = keys.take("use_scaled_rope", bool, False)
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
            max_position_embeddings=keys.take("max_seq_len", int, 131072 if bent else 8192),
            rms_norm_eps=keys.take("norm_eps", float),
            rope_theta=keys.take("rope_theta", float, 10000.0),
            rope_scaling=dataclasses.replace(LLAMA3_BEND, factor=rope_factor) if bent else None,
            tie_word_embeddings=tied,
        )
        keys.refuse_leftovers(META_METADATA)
        return config

    def to_hub(self) -> dict[str, Any]:
        """The content of a Hub `config.json`, in the spelling that the published files use."""
        data: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        data |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        data |= dataclasses.asdict(self)
        if self.rope_scaling is not None:
            data["rope_scaling"]["rope_type"] = "llama3"
        eos = list(data.pop("eos_token_ids"))
        data["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        data["torch_dtype"] = data.pop("dtype")
        if (scheme := data.pop("quantization")) is not None:
            data["quantization_config"] = {"quant_method": QUANT_METHOD, "scheme": scheme}
        return data


QUANT_METHOD = "llama32"  # how config.json calls what `llama32.quantize` has made
LLAMA3_BEND = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
LLAMA_32_SHAPES = {(2048, 16), (3072, 28)}  # (width, layers) of the 1B and the 3B

# What the model computes without asking; a checkpoint that says otherwise is another model.
HUB_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
# Keys that change nothing in what the model computes.
HUB_METADATA = frozenset(
    "_name_or_path architectures attention_dropout chunk_size_feed_forward id2label "
    "initializer_range is_encoder_decoder is_llama_config label2id max_length max_sequence_length "
    "output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache".split()
)
META_METADATA = frozenset(("max_batch_size", "model_parallel_size", "vocab_size"))


def _scheme(quantization: Mapping[str, Any] | None) -> str | None:
    """The scheme, of weights that this package has quantized; no others are understood."""
    if quantization is None:
        return None
    keys = _Keys(quantization, file="config.json: quantization_config")
    if keys.take("quant_method", str, "") != QUANT_METHOD:
        raise ValueError(
            f"config.json: quantization_config: only weights quantized by {QUANT_METHOD} load; "
            "take the checkpoint that these were made from"
        )
    scheme = keys.take("scheme", str)
    keys.refuse_leftovers(frozenset())
    return scheme


def _rope_from_hub(keys: "_Keys") -> tuple[float, RopeScaling | None]:
    """`rope_theta` and `rope_scaling` (transformers 4), or both in `rope_parameters` (5)."""
    theta = keys.take("rope_theta", float, 10000.0)
    parameters = keys.take("rope_scaling", dict, {}) | keys.take("rope_parameters", dict, {})
    rope = _Keys(parameters, file="config.json: rope_scaling")
    theta = rope.take("rope_theta", float, theta)
    legacy = rope.take("type", str, "default")
    kind = rope.take("rope_type", str, legacy)
    if kind == "default":
        rope.refuse_leftovers(frozenset(("factor",)))
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope type {kind!r} is not supported, only 'llama3' is")
    scaling = RopeScaling(**{f.name: rope.take(f.name, f.type) for f in fields(RopeScaling)})
    rope.refuse_leftovers(frozenset())
    return theta, scaling


class _Keys:
    """The keys of a JSON object, taken out one by one with their types checked.

    null counts as absent, as it does in the published files.
    """

    def __init__(self, data: Mapping[str, Any], *, file: str) -> None:
        self.left = {key: value for key, value in data.items() if value is not None}
        self.file = file

    def take(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.left.pop(key, default)
        if value is None:
            raise ValueError(f"{self.file}: {key} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.file}: {key} has the wrong type: {value!r}")
        return value

    def find(self, key: str, kind: Any) -> Any:
        """As `take`, but None where the key is absent."""
        return self.take(key, kind) if key in self.left else None

    def refuse_leftovers(self, harmless: frozenset[str]) -> None:
        if unknown := sorted(self.left.keys() - harmless):
            raise ValueError(
                f"{self.file}: unknown key {', '.join(unknown)}; it may change the model, so it "
                "is not ignored: remove it if you know that it does not"
            )
