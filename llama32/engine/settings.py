"""What one may say of an engine. Plain Python, checked where it is said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llama32.config import LlamaConfig
from llama32.engine.request import Request


@runtime_checkable
class Drafter(Protocol):
    """Guesses how the requests of one engine go on."""

    def propose(self, asked: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """The next tokens, at most as many as asked for, of those it has an idea of."""
        ...

    def release(self, request: Request) -> None:
        """A request has ended, or has lost its pages and waits to begin again."""
        ...


@runtime_checkable
class Speculation(Protocol):
    """Where drafts come from: `PromptLookup`, `DraftModel`, or something of your own."""

    @property
    def num_tokens(self) -> int:
        """Drafts of a request in a step, at most."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """What a drafter takes of the KV cache's memory for each token in it."""
        ...

    def drafter(self, config: LlamaConfig, settings: "EngineSettings") -> Drafter:
        """One for an engine whose model is of this config; `settings` say `page_size` and
        `cache_tokens` as they have turned out. ValueError if it does not fit the model."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How many requests at once, in how much memory, and how they are run.

    The size of the KV cache is given in tokens or in bytes. If neither is: on a GPU it takes
    `memory_fraction` of what is free when the engine is made, elsewhere up to 4 GiB, which are
    only used as they fill.

    `deterministic` asks for the same bits in any company (see `rows.py`); None takes it where it
    is free, which is tried out on the model at hand: `Engine.deterministic` tells.

    `cache_dtype` "int8" halves the memory of bf16 keys and values, and rounds them; see
    `int8_cache.py`. It is not for CUDA graphs.

    `seed` makes what is drawn for requests without a seed of their own the same in every run: the
    first such request gets the first number drawn from it, and so on. None leaves it to chance.

    `speculation` may give a request several tokens in a step, and changes none (`speculation.py`).
    """

    max_running: int = 64  # more wait
    prefill_tokens: int = 512  # prompt tokens in a step, at most: the longest others are held up
    cache_tokens: int | None = None
    cache_bytes: int | None = None
    cache_dtype: str | None = None  # "int8", or that of the model
    memory_fraction: float = 0.9
    page_size: int | None = None  # slots; None: 64, and 128 on a GPU
    deterministic: bool | None = None
    compiled: bool = False  # through torch.compile (`Engine.warm_up`); not deterministic
    cuda_graphs: bool | None = None  # decoding as CUDA graphs; None: on a GPU
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
        """Rows that decoding takes in a step, unless answers are replayed."""
        drafts = self.speculation.num_tokens if self.speculation else 0
        return self.max_running * (1 + drafts)
