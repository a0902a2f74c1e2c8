"""Statistics of an engine, and a snapshot of its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from warnings import warn

from llama32.engine.request import Request

COUNTERS = "steps", "prompt_computed", "prompt_cached", "generated", "drafted", "accepted"


@dataclass(frozen=True)
class Stats:
    """Totals since the start of an engine, and its present state.

    Counts are in tokens unless named otherwise.
    """

    steps: int
    prompt_computed: int  # prompt tokens that went through the model
    prompt_cached: int  # prompt tokens found in the prefix cache
    generated: int
    drafted: int
    accepted: int  # drafts equal to the model's own tokens
    preemptions: int
    running: int  # requests
    waiting: int  # requests
    pages_held: int  # referenced by running requests
    pages_evictable: int  # cached, but not referenced
    pages: int  # in total

    @property
    def pages_idle(self) -> int:
        """Deprecated name of `pages_evictable`, for removal in release 0.3."""
        warn("Stats.pages_idle: use Stats.pages_evictable", DeprecationWarning, stacklevel=2)
        return self.pages_evictable

    @property
    def hit_rate(self) -> float:
        """Fraction of prompt tokens found in the prefix cache."""
        return self.prompt_cached / max(self.prompt_cached + self.prompt_computed, 1)

    @property
    def acceptance_rate(self) -> float:
        """Fraction of drafts accepted."""
        return self.accepted / max(self.drafted, 1)


@dataclass(frozen=True)
class CacheSnapshot:
    """The pages of the cache between two steps."""

    num_pages: int
    page_size: int
    evictable: Sequence[int]  # pages that are cached, but not referenced
    running: Sequence[tuple[Request, Sequence[int]]]  # requests with their pages, oldest first
    num_waiting: int  # requests
