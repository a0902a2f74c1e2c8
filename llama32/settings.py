"""What a request asks of the sampler: temperature, penalties, where to stop.

Plain Python, so that what plans and queues requests needs no torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, no_type_check


def real(x: Any) -> float:
    """The number as a float; unlike `float` itself it refuses text."""
    return float(+x)


@dataclass(frozen=True)
class Grammar:
    """What form an output is to have: made by `json`, `regex` or `choice`."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool = True) -> "Grammar":
        """JSON that a schema allows; without one, any object."""
        anything = {"type": "object"}
        return cls("json_schema", json.dumps(anything if schema is True else schema))

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """The whole text matches. (syntax of Rust's regex: no look-around, no back-references)"""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """Just one of these."""
        if isinstance(texts, str) or not texts or not all(texts):
            raise ValueError(f"Grammar.choice: {texts!r:.60} is not a list of texts, none empty")
        return cls("choice", json.dumps([*texts]))


RULES: dict[str, tuple[Callable, Callable[[Any], bool], str]] = {  # form, condition, in words
    "temperature": (real, lambda t: 0 <= t <= 1e6, "0 (greedy) to 1e6"),
    "top_k": (index, lambda k: 1 <= k < 2**31, "1 to 2**31 - 1"),
    "top_p": (real, lambda p: 0 < p <= 1, "above 0, up to 1"),
    "min_p": (real, lambda p: 0 <= p <= 1, "0 to 1"),
    "repetition_penalty": (real, lambda x: 0.01 <= x <= 100, "0.01 to 100"),
    "presence_penalty": (real, lambda x: -100 <= x <= 100, "-100 to 100"),
    "frequency_penalty": (real, lambda x: -100 <= x <= 100, "-100 to 100"),
    "logit_bias": (
        lambda bias: {index(token): real(x) for token, x in bias.items()},
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


@no_type_check  # the shape checker of the tests would be first to refuse, and say less
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What one request asks of the sampler, checked here so that nothing downstream has to.

    The limits keep every score finite in fp32: no request can turn its own row into nan.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None  # the token that crosses p is kept
    min_p: float | None = None
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output only, as is the next
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()  # a single text may be given; kept as a tuple
    stop_ids: Sequence[int] = ()  # besides the checkpoint's own eos ids
    ignore_eos: bool = False
    seed: int | None = None
    max_new_tokens: int = 512
    logprobs: int | None = None  # 0: of the chosen token; n: also of the n likeliest
    grammar: Grammar | None = None  # what an output that ends by itself is like (`guides.py`)

    def __post_init__(self):
        for name, (form, holds, allowed) in RULES.items():
            given = getattr(self, name)
            if given is None and getattr(Sampling, name, ...) is None:
                continue
            try:
                value = form(given)
                if not holds(value):
                    raise ValueError
            except (TypeError, ValueError, AttributeError, OverflowError):
                raise ValueError(f"Sampling: {name} is {given!r}, allowed: {allowed}") from None
            object.__setattr__(self, name, value)  # frozen for everyone else

    @classmethod
    def from_generation_config(cls, data: Mapping[str, Any]) -> "Sampling":
        """The defaults of a checkpoint, from the contents of its `generation_config.json`.

        Without `do_sample` they mean greedy, as in transformers. With it, an absent `top_k` means
        none: the 50 that transformers fills in is its own default, which neither Meta's code nor
        vLLM applies. Keys that are not about sampling are read elsewhere.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        said = {name: data[name] for name in names if data.get(name) is not None}
        if not data.get("do_sample"):
            said["temperature"] = 0.0
        if said.get("top_k") == 0:  # transformers' way to say none
            del said["top_k"]
        try:
            return cls(**said)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None

    @property
    def stages(self) -> frozenset[str]:
        """The stages that can change this request's choice; it does not pay for the others."""
        draws = self.temperature >= 1e-5  # vLLM's bound; below it the likeliest token is taken
        wanted = {
            "bias": self.logit_bias,
            "repetition": self.repetition_penalty != 1,
            "presence_frequency": self.presence_penalty or self.frequency_penalty,
            "draw": draws,
            "min_p": draws and self.min_p,
            "top_k": draws and self.top_k,
            "top_p": draws and self.top_p not in (None, 1),
        }
        return frozenset(stage for stage, is_wanted in wanted.items() if is_wanted)
