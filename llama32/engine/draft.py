"""Drafts of a smaller model: Llama 3.2 1B for 3B.

It reads the same pages as the large one: wherever a request's tokens are in one cache, they are in
the same slots of the other. So there are no pages to be had, held or lost besides, and room for a
draft in one is room in both. And it runs as the large one does: a request as the smaller model
sees it goes through a runner of its own, and what comes of it is a draft.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llama32.cache import bytes_per_token
from llama32.config import LlamaConfig
from llama32.engine.request import Request
from llama32.engine.runner import Runner
from llama32.engine.scheduler import Step, Work
from llama32.engine.settings import EngineSettings
from llama32.model import Llama


@dataclass(frozen=True)
class DraftModel:
    """Drafts from a model with the same vocabulary, which runs `num_tokens` times in a step.

    It draws each with the request's own settings and the random number that the large model is
    going to draw with, so that models which nearly agree nearly always draw the same token.
    """

    model: Llama = field(repr=False)
    num_tokens: int = 4  # drafts of a request in a step, at most

    def __post_init__(self) -> None:
        if not (isinstance(self.num_tokens, int) and self.num_tokens >= 1):
            raise ValueError(f"DraftModel: num_tokens is {self.num_tokens!r}, allowed: 1 or more")

    @property
    def bytes_per_token(self) -> int:
        """Of the KV cache's memory."""
        return bytes_per_token(self.model.config, self.model.norm.weight.dtype)

    def drafter(self, config: LlamaConfig, settings: EngineSettings) -> "ModelDrafter":
        """ValueError if the vocabularies differ: a token of one would be another's of the other."""
        own, its = self.model.config.vocab_size, config.vocab_size
        if own != its:
            raise ValueError(
                f"DraftModel: its vocabulary has {own} tokens, that of the model it drafts for "
                f"{its}; take a model with the same tokenizer"
            )
        # Drafts change no token, so they need not have the same bits in any company.
        runs = replace(settings, deterministic=False, speculation=None, cache_dtype=None)
        return ModelDrafter(Runner(self.model, runs), settings.prefill_tokens, self.num_tokens)


class ModelDrafter:
    """Reads what it has not yet read of each request, then goes on from there.

    No more than `budget` tokens are read in a step, so a long prompt takes several, and as long
    there are no drafts.
    """

    def __init__(self, runner: Runner, budget: int, num_tokens: int) -> None:
        self._runner = runner
        self._budget = budget
        self._num_tokens = num_tokens
        self._views: dict[Request, Request] = {}  # each as the smaller model sees it

    def propose(self, asked: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """What the smaller model says next."""
        views = {request: self._view(request) for request in asked}
        ends = {views[request]: request.length + n for request, n in asked.items()}
        step = self._reading(ends)
        while step.prefill or step.decode:
            on = [view for view in self._run(step) if view.length < ends[view]]
            step = Step([], [Work(view, view.length - 1, view.length) for view in on])
        return {request: view.output[len(request.output) :] for request, view in views.items()}

    def release(self, request: Request) -> None:
        """What was read of it is lost."""
        self._views.pop(request, None)

    def _view(self, request: Request) -> Request:
        """Brought up to date. Drafts that were right stay, with their keys and values."""
        view = self._views.get(request)
        if view is None:
            view = self._views[request] = Request(
                prompt=request.prompt,
                longest=request.longest,
                sampling=replace(request.sampling, logprobs=None),
                seed=request.seed,
                pages=request.pages,
            )
        right = max(len(view.output) - self._num_tokens, 0)
        for draft, token in zip(view.output[right:], request.output[right:], strict=False):
            if draft != token:
                break
            right += 1
        view.output[right:] = request.output[right:]
        view.num_computed = min(view.num_computed, len(view.prompt) + right, view.length - 1)
        return view

    def _reading(self, views: Iterable[Request]) -> Step:
        """All that is unread, as far as the budget goes; those first of which that is little.

        One token is always, and two are where all drafts were right. Of more than that all but the
        last are read like a prompt, without logits.
        """
        prefill: list[Work] = []
        decode: list[Work] = []
        budget = self._budget
        for view in sorted(views, key=lambda view: view.length - view.num_computed):
            start = view.num_computed
            stop = min(view.length, start + budget)
            border = start if view.length - start <= 2 else min(stop, view.length - 1)
            if start < border:
                prefill.append(Work(view, start, border))
            if border < stop:
                decode.append(Work(view, border, stop))
            budget -= stop - start
        return Step(prefill, decode)

    def _run(self, step: Step) -> list[Request]:
        """Who got a draft by it. A row that is not finite gives none, and is no error of anyone's:
        that is for the large model to say."""
        drawn = [one for one in self._runner.run(step) if one.error is None]
        for view, _, stop in (*step.prefill, *step.decode):
            view.num_computed = stop
        for one in drawn:
            one.request.append(one.id)
        return [one.request for one in drawn]
