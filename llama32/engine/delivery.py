"""Delivery of sampled tokens: first to the requests, then to user callbacks.

An exception in a user callback, like an error of a row or a matcher, ends one request only.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from llama32.engine.request import Request
from llama32.engine.scheduler import ScheduledStep
from llama32.engine.speculation import group_by_position
from llama32.engine.token_sampling import SampledToken
from llama32.generate import Token


class TokenDelivery:
    """Appends the tokens of a step to their requests, counts them, and calls user callbacks.

    `end(request, reason, error)` ends a request.
    """

    def __init__(
        self, end: Callable[[Request, str, Exception | None], None], counts: Counter[str]
    ) -> None:
        self._end = end
        self._counts = counts

    def deliver(self, step: ScheduledStep, tokens: Sequence[SampledToken]) -> list[Request]:
        """Append tokens and call callbacks; return the requests that got a token or ended.

        With drafts, a request may get several tokens. Tokens are delivered by position: first the
        first token of every request, then the second.
        """
        lengths = {sampled.request: sampled.request.length for sampled in tokens}
        for position, group in enumerate(group_by_position(tokens)):
            due = [
                sampled
                for sampled in group
                if is_due(sampled.request, lengths[sampled.request] + position)
            ]
            appended = [sampled.request for sampled in due if self._append(sampled)]
            # User callbacks may raise KeyboardInterrupt or abort any request, so they run only when
            # all requests have their token.
            if position == 0:
                self._report_prefill(step)
            for request in appended:
                if request.on_token:
                    self._run_callback(request, request.on_token, request.tokens[-1])
        return list(lengths)

    def _append(self, sampled: SampledToken) -> bool:
        """Append a token to its request, or end the request; False if there is no token."""
        request, id, logprobs, error = sampled
        if error is not None:
            self._end(request, "error", error)
            return False
        try:
            reason = request.append(id)
        except ValueError as error:  # of the matcher, for example a grammar that is too large
            self._end(request, "error", error)
            return False
        request.tokens.append(Token(id, logprobs, reason))
        self._counts["generated"] += 1
        if len(request.output) == 1:
            self._counts["prompt_cached"] += request.num_cached
            self._counts["prompt_computed"] += len(request.prompt) - request.num_cached
        if reason is not None:
            self._end(request, reason, None)
        return True

    def _report_prefill(self, step: ScheduledStep) -> None:
        """Report the progress of every prompt in the step."""
        computed = {chunk.request: chunk.stop for chunk in (*step.prefill, *step.decode)}
        for request, stop in computed.items():
            if request.on_prefill and len(request.output) <= 1:
                total = len(request.prompt)
                self._run_callback(request, request.on_prefill, min(stop, total), total)

    def _run_callback(
        self, request: Request, callback: Callable[..., object], *arguments: object
    ) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            if request.error is None:
                self._end(request, "error", error)


def is_due(request: Request, length: int) -> bool:
    """True if the request still runs and has exactly `length` tokens.

    False after an earlier token of the same step ended the request, or a callback for that token
    ran further steps.
    """
    return request.finish_reason is None and request.length == length
