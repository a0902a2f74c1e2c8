"""Speculative decoding: several tokens of a request in one step, and the same ones.

A drafter guesses the next tokens; the model runs over all of them in one step, one row each, and
what it says after each row tells how many were right. (Leviathan et al. 2023)

A row is a row, whether its token was drafted or known. And the token drawn from it is a function
of its logits, the seed and its place (`sampling.py`). So what the request says next is known after
every row that has the right tokens before it, and a draft is right if it is just that. The output
is that without drafts: to the bit where the engine is deterministic, elsewhere up to rounding. The
rejection sampling of the paper keeps its distribution, and accepts a token drawn from q with
probability min(1, p / q). With drafts that are certain, as those of an n-gram, both come to p. A
draft model draws with the very number that the model is going to draw with, and agrees as often as
one number leads both to the same token: less often than the paper's 1 - TV(p, q), and always where
both are greedy and rank the same token first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from llama32.engine.request import Request
from llama32.engine.scheduler import Scheduler, Step
from llama32.engine.settings import Drafter

RETRY = 1 / 16  # drafts for each token without: who got none right is tried again after 8 to 16


@runtime_checkable
class Draw(Protocol):
    """A token that was drawn for a request."""

    @property
    def request(self) -> Request: ...
    @property
    def id(self) -> int: ...


Drawn = TypeVar("Drawn", bound=Draw)


def verified(drafts: Sequence[int], drawn: Sequence[Drawn]) -> Sequence[Drawn]:
    """Of what was drawn before the first draft and after each: up to the first that is not what
    had been drafted. It is valid itself; those behind it followed another token."""
    right = 0
    while right < len(drafts) and drawn[right].id == drafts[right]:
        right += 1
    return drawn[: right + 1]


def in_turns(drawn: Iterable[Drawn]) -> list[list[Drawn]]:
    """All first tokens, then all second ones, and so on; without any, one turn of none."""
    turns: list[list[Drawn]] = [[]]
    seen: dict[Request, int] = {}
    for one in drawn:
        n = seen[one.request] = seen.get(one.request, -1) + 1
        if n == len(turns):
            turns.append([])
        turns[n].append(one)
    return turns


class Speculator:
    """Lengthens steps by drafts: of each request as many as have been worth it.

    One more when all were right, half as many when fewer than half were; then, below one, none for
    a while.
    """

    def __init__(self, drafter: Drafter, num_tokens: int) -> None:
        self._drafter = drafter
        self._num_tokens = num_tokens
        self._wanted: dict[Request, float] = {}

    def lengthen(self, step: Step, scheduler: Scheduler) -> Step:
        """The step that was just planned, with rows for drafts."""
        asked: dict[Request, int] = {}
        for request, _, stop in step.decode:
            if request.guide is not None:  # it has not been where a draft would take it
                continue
            wanted = int(self._wanted.get(request, self._num_tokens))
            if stop == request.length and (room := scheduler.reserve(request, wanted)):
                asked[request] = room
        for request, drafts in self._drafter.propose(asked).items():
            request.drafts = drafts[: asked[request]]
        decode = [work._replace(stop=work.stop + len(work.request.drafts)) for work in step.decode]
        return step._replace(decode=decode)

    def learn(self, rights: Mapping[Request, int]) -> None:
        """Of each request's drafts in the step so many were right."""
        for request, right in rights.items():
            wanted = self._wanted.get(request, float(self._num_tokens))
            if not request.drafts:
                wanted += RETRY if wanted < 1 else 0
            elif right * 2 < len(request.drafts):
                wanted /= 2
            elif right == len(request.drafts):
                wanted = min(wanted + 1, self._num_tokens)
            self._wanted[request] = wanted

    def release(self, request: Request) -> None:
        """It has ended, or waits to begin again."""
        self._wanted.pop(request, None)
        self._drafter.release(request)
