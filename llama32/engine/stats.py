"""What an engine tells of itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama32.engine.request import Request

COUNTED = "steps", "prompt_computed", "prompt_cached", "generated", "drafted", "accepted"


@dataclass(frozen=True)
class Stats:
    """What an engine has done so far, and what it holds now. Counts are of tokens unless named."""

    steps: int
    prompt_computed: int  # of the prompts that were read, what went through the model
    prompt_cached: int  # and what was found in the cache
    generated: int
    drafted: int
    accepted: int  # of those drafted: the model said the same
    preemptions: int
    running: int  # requests
    waiting: int  # requests
    pages_held: int
    pages_idle: int  # remembered, and free to be taken
    pages: int

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that was found in the cache."""
        return self.prompt_cached / max(self.prompt_cached + self.prompt_computed, 1)

    @property
    def acceptance_rate(self) -> float:
        """The share of drafts that were right."""
        return self.accepted / max(self.drafted, 1)


@dataclass(frozen=True)
class View:
    """Who holds which pages of the cache, between two steps."""

    num_pages: int
    page_size: int
    idle: Sequence[int]  # remembered, and free to be taken
    held: Sequence[tuple[Request, Sequence[int]]]  # by those that run, oldest first
    num_waiting: int
