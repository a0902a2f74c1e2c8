"""Drafts from a smaller model: Llama 3.2 1B for 3B.

The smaller model has a KV cache of its own with the same page numbers: a request's tokens are in
the same slots of both caches. The scheduler therefore allocates pages once, and a slot for a draft
in one cache is a slot in the other. For every request, the drafter has a draft request, which goes
through the smaller model's own runner; the tokens of the draft request are the drafts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llama32.cache.kv_cache import bytes_per_token
from llama32.config import LlamaConfig
from llama32.engine.request import Request
from llama32.engine.runner import Runner
from llama32.engine.scheduler import Chunk, ScheduledStep
from llama32.engine.settings import EngineSettings
from llama32.model import Llama


@dataclass(frozen=True)
class DraftModel:
    """Drafts from a model with the same vocabulary, which runs `num_tokens` times per step.

    A draft is sampled with the request's settings and with the random number that the large model
    will use, so models that nearly agree nearly always sample the same token.
    """

    model: Llama = field(repr=False)
    num_tokens: int = 4  # drafts per request and step, at most

    def __post_init__(self) -> None:
        if not (isinstance(self.num_tokens, int) and self.num_tokens >= 1):
            raise ValueError(f"DraftModel: num_tokens is {self.num_tokens!r}, allowed: 1 or more")

    @property
    def bytes_per_token(self) -> int:
        """KV cache memory of the smaller model, per token."""
        return bytes_per_token(self.model.config, self.model.norm.weight.dtype)

    def drafter(self, config: LlamaConfig, settings: EngineSettings) -> "ModelDrafter":
        """Return a drafter. Raises ValueError if the vocabularies differ."""
        draft_vocabulary, vocabulary = self.model.config.vocab_size, config.vocab_size
        if draft_vocabulary != vocabulary:
            raise ValueError(
                f"DraftModel: the draft model's vocabulary has {draft_vocabulary} tokens, the "
                f"engine's model has {vocabulary}; use a draft model with the same tokenizer"
            )
        # Drafts change no token of the output, so their model need not be batch-invariant.
        settings = replace(settings, deterministic=False, speculation=None, cache_dtype=None)
        return ModelDrafter(Runner(self.model, settings), settings.prefill_tokens, self.num_tokens)


class ModelDrafter:
    """Computes the new tokens of each request, then generates drafts.

    A step computes at most `budget` new tokens. A long prompt therefore takes several steps, and
    the request gets no drafts until the prompt is complete.
    """

    def __init__(self, runner: Runner, budget: int, num_tokens: int) -> None:
        self._runner = runner
        self._budget = budget
        self._num_tokens = num_tokens
        self._draft_requests: dict[Request, Request] = {}

    def propose(self, limits: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """Return the next tokens by the smaller model."""
        draft_requests = {request: self._sync(request) for request in limits}
        ends = {draft_requests[request]: request.length + n for request, n in limits.items()}
        step = self._schedule(ends)
        while step.prefill or step.decode:
            unfinished = [request for request in self._run(step) if request.length < ends[request]]
            chunks = [Chunk(request, request.length - 1, request.length) for request in unfinished]
            step = ScheduledStep([], chunks)
        return {
            request: draft_request.output[len(request.output) :]
            for request, draft_request in draft_requests.items()
        }

    def release(self, request: Request) -> None:
        """Delete the draft request of a request that ended or was preempted."""
        self._draft_requests.pop(request, None)

    def _sync(self, request: Request) -> Request:
        """Return the draft request with the request's tokens. Accepted drafts stay computed."""
        draft_request = self._draft_requests.get(request)
        if draft_request is None:
            draft_request = self._draft_requests[request] = Request(
                prompt=request.prompt,
                max_length=request.max_length,
                sampling=replace(request.sampling, logprobs=None),
                seed=request.seed,
                pages=request.pages,
            )
        output = draft_request.output
        num_equal = max(len(output) - self._num_tokens, 0)
        for draft, token in zip(output[num_equal:], request.output[num_equal:], strict=False):
            if draft != token:
                break
            num_equal += 1
        output[num_equal:] = request.output[num_equal:]
        draft_request.num_computed = min(
            draft_request.num_computed,
            len(draft_request.prompt) + num_equal,
            draft_request.length - 1,
        )
        return draft_request

    def _schedule(self, draft_requests: Iterable[Request]) -> ScheduledStep:
        """Schedule new tokens within the budget, requests with the fewest new tokens first.

        A request has one new token, or two after all drafts were accepted: decode rows. If more
        tokens are new, all but the last are prefill, without logits.
        """
        prefill: list[Chunk] = []
        decode: list[Chunk] = []
        budget = self._budget
        for request in sorted(draft_requests, key=lambda r: r.length - r.num_computed):
            start = request.num_computed
            stop = min(request.length, start + budget)
            middle = start if request.length - start <= 2 else min(stop, request.length - 1)
            if start < middle:
                prefill.append(Chunk(request, start, middle))
            if middle < stop:
                decode.append(Chunk(request, middle, stop))
            budget -= stop - start
        return ScheduledStep(prefill, decode)

    def _run(self, step: ScheduledStep) -> list[Request]:
        """Run a step and return the draft requests that got a token.

        A row that is not finite gives no draft and no error: only the large model may end a
        request.
        """
        tokens = [sampled for sampled in self._runner.run(step) if sampled.error is None]
        for request, _, stop in (*step.prefill, *step.decode):
            request.num_computed = stop
        for sampled in tokens:
            sampled.request.append(sampled.id)
        return [sampled.request for sampled in tokens]
