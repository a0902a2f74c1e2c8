"""Speculative decoding: several tokens of a request in one step, with unchanged output.

A drafter guesses the next tokens. The model runs over all guesses in one step, a row for each, and
its logits verify the guesses. (Leviathan et al. 2023)

The model computes a row in the same way for a draft and for a known token, and the token sampled
from a row is a function of the logits, the seed and the position (`sampling.py`). Every row after
correct tokens therefore gives the request's true next token, and a draft is accepted if equal to
the true token. Drafts leave the output unchanged: to the bit if the engine is deterministic,
otherwise up to rounding.

The paper's rejection sampling preserves only the distribution: a token drawn from the drafter's
distribution q is accepted with probability min(1, p / q), where p is the model's distribution. For
deterministic drafts, such as n-gram matches, both methods accept with probability p. A draft model
samples with the same random number as the model. The draft is accepted if both models then pick the
same token: less often than the paper's 1 - TV(p, q), but always if both models are greedy and rank
the same token first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from llama32.engine.request import Request
from llama32.engine.scheduler import ScheduledStep, Scheduler
from llama32.engine.settings import Drafter

# Growth per step of a draft length below one. A request whose only draft was wrong has the length
# 1/2, and gets the next draft after 8 steps.
RETRY_RATE = 1 / 16


@runtime_checkable
class HasToken(Protocol):
    """A token sampled for a request."""

    @property
    def request(self) -> Request: ...
    @property
    def id(self) -> int: ...


Token = TypeVar("Token", bound=HasToken)


def accept(drafts: Sequence[int], sampled: Sequence[Token]) -> Sequence[Token]:
    """Return the sampled tokens up to and including the first mismatch with a draft.

    `sampled[i]` is the model's own token at the position of `drafts[i]`; the last sampled token
    follows all drafts. The first mismatch is a valid token; later tokens follow a wrong draft.
    """
    num_accepted = 0
    while num_accepted < len(drafts) and sampled[num_accepted].id == drafts[num_accepted]:
        num_accepted += 1
    return sampled[: num_accepted + 1]


def group_by_position(tokens: Iterable[Token]) -> list[list[Token]]:
    """Group tokens by position: the first token of every request, then the second, and so on.

    Without tokens, returns a single empty group.
    """
    groups: list[list[Token]] = [[]]
    positions: dict[Request, int] = {}
    for token in tokens:
        position = positions[token.request] = positions.get(token.request, -1) + 1
        if position == len(groups):
            groups.append([])
        groups[position].append(token)
    return groups


class Speculator:
    """Adds drafts to steps, and adapts the number of drafts per request to the acceptance.

    The draft length of a request grows by one if all drafts were accepted, and is halved if fewer
    than half were. While the length is below one, the request gets no drafts.
    """

    def __init__(self, drafter: Drafter, num_tokens: int) -> None:
        self._drafter = drafter
        self._num_tokens = num_tokens
        self._draft_lengths: dict[Request, float] = {}

    def add_drafts(self, step: ScheduledStep, scheduler: Scheduler) -> ScheduledStep:
        """Return the step just scheduled, with rows for drafts."""
        limits: dict[Request, int] = {}
        for request, _, stop in step.decode:
            if request.matcher is not None:  # a matcher can mask only the next token
                continue
            length = int(self._draft_lengths.get(request, self._num_tokens))
            if stop == request.length and (room := scheduler.reserve_drafts(request, length)):
                limits[request] = room
        for request, drafts in self._drafter.propose(limits).items():
            request.drafts = drafts[: limits[request]]
        decode = [
            chunk._replace(stop=chunk.stop + len(chunk.request.drafts)) for chunk in step.decode
        ]
        return step._replace(decode=decode)

    def update(self, num_accepted: Mapping[Request, int]) -> None:
        """Adapt the draft lengths to the number of drafts accepted in the step."""
        for request, count in num_accepted.items():
            length = self._draft_lengths.get(request, float(self._num_tokens))
            if not request.drafts:
                length += RETRY_RATE if length < 1 else 0
            elif count * 2 < len(request.drafts):
                length /= 2
            elif count == len(request.drafts):
                length = min(length + 1, self._num_tokens)
            self._draft_lengths[request] = length

    def release(self, request: Request) -> None:
        """Discard the state of a request that ended or was preempted."""
        self._draft_lengths.pop(request, None)
        self._drafter.release(request)
