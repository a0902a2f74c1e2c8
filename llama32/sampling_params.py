"""Sampling settings of a request: temperature, penalties, grammar, stop conditions.

Plain Python, so that the scheduler imports no torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, no_type_check


def to_float(x: Any) -> float:
    """Convert a number to float; unlike `float`, raise TypeError for text."""
    return float(+x)


@dataclass(frozen=True)
class Grammar:
    """The form that an output must have, made by `json`, `regex` or `choice`."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool = True) -> "Grammar":
        """Require JSON that matches a schema, by default any object."""
        anything = {"type": "object"}
        return cls("json_schema", json.dumps(anything if schema is True else schema))

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Require a match of the whole text. (Rust's syntax: no look-around, no back-references)"""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """Require exactly one of several texts."""
        if isinstance(texts, str) or not texts or not all(texts):
            raise ValueError(f"Grammar.choice: {texts!r:.60} is not a list of texts, none empty")
        return cls("choice", json.dumps([*texts]))


FIELD_RULES: dict[str, tuple[Callable, Callable[[Any], bool], str]] = {  # convert, check, in words
    "temperature": (to_float, lambda t: 0 <= t <= 1e6, "0 (greedy) to 1e6"),
    "top_k": (index, lambda k: 1 <= k < 2**31, "1 to 2**31 - 1"),
    "top_p": (to_float, lambda p: 0 < p <= 1, "above 0, up to 1"),
    "min_p": (to_float, lambda p: 0 <= p <= 1, "0 to 1"),
    "repetition_penalty": (to_float, lambda x: 0.01 <= x <= 100, "0.01 to 100"),
    "presence_penalty": (to_float, lambda x: -100 <= x <= 100, "-100 to 100"),
    "frequency_penalty": (to_float, lambda x: -100 <= x <= 100, "-100 to 100"),
    "logit_bias": (
        lambda bias: {index(token): to_float(x) for token, x in bias.items()},
        lambda bias: all(t >= 0 and -100 <= x <= 100 for t, x in bias.items()),
        "token ids, each with -100 to 100",
    ),
    "stop": (
        lambda stop: (stop,) if isinstance(stop, str) else tuple(stop),
        lambda texts: all(map(str.__len__, texts)),
        "a text or a list of texts, none empty",
    ),
    "stop_ids": (lambda i: tuple(map(index, i)), lambda i: min(i, default=0) >= 0, "token ids"),
    "ignore_eos": (lambda b: b, lambda b: isinstance(b, bool), "True or False"),
    "seed": (index, lambda n: -(2**63) <= n < 2**64, "64 bits, -2**63 to 2**64 - 1"),
    "max_new_tokens": (index, lambda n: n >= 1, "1 or more"),
    "logprobs": (index, lambda n: n >= 0, "0 or more"),
    "grammar": (lambda g: g, lambda g: isinstance(g, Grammar), "a Grammar"),
}


@no_type_check  # else the type checks of the tests would raise first, with a worse message
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of one request, checked here and nowhere else.

    The limits keep every score in fp32 finite, so no request can cause a nan in a row.
    Raises ValueError with the name, the wrong value and the allowed values.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None  # the token that crosses p is kept
    min_p: float | None = None
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output only
    frequency_penalty: float = 0.0  # over the output only
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()  # a single text is allowed; stored as a tuple
    stop_ids: Sequence[int] = ()  # in addition to the checkpoint's eos ids
    ignore_eos: bool = False
    seed: int | None = None
    max_new_tokens: int = 512
    logprobs: int | None = None  # 0: of the sampled token; n: also of the n likeliest
    grammar: Grammar | None = None  # the form of outputs that are not cut off (`text/grammar.py`)

    def __post_init__(self):
        for name, (convert, is_valid, allowed) in FIELD_RULES.items():
            raw = getattr(self, name)
            if raw is None and getattr(Sampling, name, ...) is None:
                continue
            try:
                value = convert(raw)
                if not is_valid(value):
                    raise ValueError
            except (TypeError, ValueError, AttributeError, OverflowError):
                raise ValueError(f"Sampling: {name} is {raw!r}, allowed: {allowed}") from None
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @classmethod
    def from_generation_config(cls, data: Mapping[str, Any]) -> "Sampling":
        """Read a checkpoint's defaults from the content of `generation_config.json`.

        Without `do_sample` sampling is greedy, as in transformers. With `do_sample`, an absent
        `top_k` means no top-k: transformers fills in 50, a default that neither Meta's code nor
        vLLM applies. Keys without influence on sampling are read elsewhere.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: data[name] for name in names if data.get(name) is not None}
        if not data.get("do_sample"):
            values["temperature"] = 0.0
        if values.get("top_k") == 0:  # transformers writes 0 for no top-k
            del values["top_k"]
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None

    @property
    def stages(self) -> frozenset[str]:
        """The stages that can change the sampled token; `sample` skips all other stages."""
        draws = self.temperature >= 1e-5  # vLLM's bound; below, sampling is greedy
        active = {
            "bias": self.logit_bias,
            "repetition": self.repetition_penalty != 1,
            "presence_frequency": self.presence_penalty or self.frequency_penalty,
            "draw": draws,
            "min_p": draws and self.min_p,
            "top_k": draws and self.top_k,
            "top_p": draws and self.top_p not in (None, 1),
        }
        return frozenset(stage for stage, is_active in active.items() if is_active)
