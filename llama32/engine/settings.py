"""Settings of an engine. Plain Python, checked on construction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llama32.config import LlamaConfig
from llama32.engine.request import Request


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens for the requests of one engine."""

    def propose(self, limits: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """Return drafts for each request, at most `limits[request]`; requests may be missing."""
        ...

    def release(self, request: Request) -> None:
        """Discard the state of a request that ended or was preempted."""
        ...


@runtime_checkable
class Speculation(Protocol):
    """A source of drafts: `PromptLookup`, `DraftModel` or a class of your own."""

    @property
    def num_tokens(self) -> int:
        """Drafts per request and step, at most."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """KV cache memory of the drafter, for each token of the engine's cache."""
        ...

    def drafter(self, config: LlamaConfig, settings: "EngineSettings") -> Drafter:
        """Return a drafter for an engine whose model has this config.

        `settings` contain the engine's actual `page_size` and `cache_tokens`. Raises ValueError if
        the drafter does not fit the model.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Concurrency, memory and execution of an engine.

    The size of the KV cache is given in tokens or in bytes. By default the cache takes
    `memory_fraction` of the memory that is free on a GPU when the engine is created. On other
    devices the default is up to 4 GiB, which are only used as the cache fills.

    `deterministic=True` makes the engine batch-invariant (see `batch_invariance.py`). By default a
    test of the model decides: only if free. `Engine.deterministic` has the result.

    `cache_dtype="int8"` halves the memory of bf16 keys and values by rounding (see
    `int8_kv_cache.py`), and excludes CUDA graphs.

    `seed` makes runs repeatable: requests without a seed get random numbers from this seed, in
    order of arrival. With None, these numbers differ in every run.

    `speculation` may give a request several tokens in a step. The tokens are the same as without
    (see `speculation.py`).
    """

    max_running: int = 64  # further requests wait
    prefill_tokens: int = 512  # prompt tokens per step, at most: limits the delay of decoding
    cache_tokens: int | None = None
    cache_bytes: int | None = None
    cache_dtype: str | None = None  # "int8"; None: the dtype of the model
    memory_fraction: float = 0.9
    page_size: int | None = None  # slots per page; None: 128 on a GPU, else 64
    deterministic: bool | None = None
    compiled: bool = False  # with torch.compile (see `Engine.warm_up`); not deterministic
    cuda_graphs: bool | None = None  # for decoding; None: on a GPU
    speculation: Speculation | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "prefill_tokens", "cache_tokens", "cache_bytes", "page_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"EngineSettings: {name} is {value!r}, allowed: 1 or more")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(
                f"EngineSettings: memory_fraction is {self.memory_fraction!r}, "
                f"allowed: above 0, up to 1"
            )
        if self.cache_dtype not in (None, "int8"):
            raise ValueError(
                f"EngineSettings: cache_dtype is {self.cache_dtype!r}, allowed: 'int8' or None"
            )
        if self.cache_tokens is not None and self.cache_bytes is not None:
            raise ValueError("EngineSettings: give cache_tokens or cache_bytes, not both")

    @property
    def max_rows(self) -> int:
        """Decode rows per step, at most, apart from replays of preempted requests."""
        drafts = self.speculation.num_tokens if self.speculation else 0
        return self.max_running * (1 + drafts)
