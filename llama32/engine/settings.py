"""What one may say of an engine. Plain Python, checked where it is said."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How many requests at once, in how much memory, and how they are run.

    The size of the KV cache is given in tokens or in bytes. If neither is: on a GPU it takes
    `memory_fraction` of what is free when the engine is made, elsewhere up to 4 GiB, which are
    only used as they fill.

    `deterministic` asks for the same bits in any company (see `rows.py`); None takes it where it
    is free, which is tried out on the model at hand: `Engine.deterministic` tells.
    """

    max_running: int = 64  # more wait
    prefill_tokens: int = 512  # prompt tokens in a step, at most: the longest others are held up
    cache_tokens: int | None = None
    cache_bytes: int | None = None
    memory_fraction: float = 0.9
    page_size: int | None = None  # slots; None: 64, and 128 on a GPU
    deterministic: bool | None = None
    compiled: bool = False  # decoding through torch.compile; not deterministic
    cuda_graphs: bool | None = None  # decoding as CUDA graphs; None: on a GPU

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
        if self.cache_tokens is not None and self.cache_bytes is not None:
            raise ValueError("EngineSettings: give cache_tokens or cache_bytes, not both")
