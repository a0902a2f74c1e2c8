"""Adapter of a loaded model for EleutherAI's lm-evaluation-harness.

    from llama32.evaluation.lm_eval_adapter import Harness

    lm = Harness(llama32.load("tiny"))
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

Importing the module also registers a name: `model="llama32", model_args="model=tiny"`.
The begin-of-text token precedes every text exactly once, including rolling likelihoods and rendered
chats (whose template contains the token).
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import chunks, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from llama32.llm.llm import LLM
from llama32.llm.loading import load
from llama32.llm.result import Result
from llama32.sampling_params import Sampling
from llama32.text.chat import Control

DEFAULT_MAX_GEN_TOKS = 256  # default of lm-eval's own models
DTYPES = "float32", "bfloat16", "float16"
SAMPLING_FIELDS = {field.name for field in fields(Sampling)}

Answer = tuple[float, bool]  # log p of a continuation; True if greedy decoding yields the same

log = logging.getLogger(__name__)


@register_model("llama32")
class Harness(TemplateLM):
    """A model of lm-eval: an `LLM`, or a name with options of `llama32.load`.

    `batch_size` texts are scored together, padded to the longest; the engine batches generation.
    `max_length` is the maximum number of tokens of context and answer, by default the model's
    context; longer inputs lose their beginning, with a warning in the log. A rolling likelihood
    needs a row of logits per token of the text. `date` is the current date in rendered chats:
    set `date` for results that are reproducible on another day.
    """

    def __init__(
        self,
        model: LLM | str | Path = "tiny",
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        date: str | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, allowed: 1 or more")
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, allowed: {', '.join(DTYPES)}")
        if not isinstance(model, LLM):
            options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            if str(options.get("device")).startswith("cuda") and not torch.cuda.is_available():
                del options["device"]  # lm-eval's command line defaults to cuda
            model = load(model, **options)
        elif dtype or options:
            raise ValueError(f"{', '.join(options) or 'dtype'}: the model is loaded already")
        limit = model.config.max_position_embeddings
        if max_length is not None and not 1 < max_length <= limit:
            raise ValueError(f"max_length is {max_length}, allowed: 2 to the model's {limit}")
        self.llm, self.date = model, date
        self.batch_size, self.max_length = int(batch_size), max_length or limit
        self.bos_text = model.require_tokenizer().decode([self.prefix_token_id])

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        end = self.llm.require_tokenizer().eos_id
        return self.llm.eos_ids[0] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """Id before a text whose first token is predicted as well."""
        begins = self.llm.require_tokenizer().bos_id, self.llm.config.bos_token_id
        return next((id for id in begins if id is not None), self.eot_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, with the begin-of-text token if the checkpoint's rule adds one.

        The harness passes rendered chats as text. A text that starts with the begin-of-text token
        is a rendered chat, with control tokens. Everywhere else the text of a control token is
        plain text.
        """
        is_chat = add_special_tokens is None and string.startswith(self.bos_text)
        bos = not is_chat if add_special_tokens is None else add_special_tokens
        return self.llm.require_tokenizer().encode(string, bos=bos, allow_special=is_chat)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of whole texts, in disjoint windows; the last has a full context."""
        texts = [
            get_rolling_token_windows(
                self.tok_encode(*request.args, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for request in requests
        ]
        windows = [[(None, *make_disjoint_window(pair)) for pair in pairs] for pairs in texts]
        flat = [window for text_windows in windows for window in text_windows]
        answers = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        return [math.fsum(next(answers)[0] for _ in text_windows) for text_windows in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts up to a stop string in one batch; greedy unless a task samples."""
        prompts, sampling = [], []
        for context, gen_kwargs in (request.arguments for request in requests):
            sampling.append(to_sampling(gen_kwargs))
            room = self.max_length - sampling[-1].max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks {sampling[-1].max_new_tokens} leaves no room for a prompt in "
                    f"the context of {self.max_length}: ask for fewer tokens"
                )
            prompts.append(keep_last(room, self.tok_encode(context) or [self.prefix_token_id]))
        if not prompts:
            return []
        results = self.llm.generate(prompts, sampling, progress=False if disable_tqdm else None)
        return [self._text(*pair) for pair in zip(results, sampling, strict=True)]

    def _text(self, result: Result, sampling: Sampling) -> str:
        """Return the generated text without control tokens, as lm-eval's own models do."""
        if result.error is not None:
            raise result.error
        tokenizer = self.llm.require_tokenizer()
        control = {*tokenizer.special.values()}
        text = tokenizer.decode(id for id in result.ids if id not in control)
        for end in sampling.stop:
            text = text.partition(end)[0]
        return text

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Answer]:
        """Score requests of (cache key, context, continuation).

        Single-token choices after the same context have the same model input, which runs once.
        """
        requests_by_input = defaultdict(list)  # model input: indices of requests
        for i, (_, context, continuation) in enumerate(requests):
            requests_by_input[self._model_input(context, continuation)].append(i)
        longest_first = sorted(requests_by_input, key=len, reverse=True)
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for inputs in chunks(longest_first, self.batch_size):
                num_rows = [
                    max(len(requests[i][2]) for i in requests_by_input[ids]) for ids in inputs
                ]
                for ids, logits in zip(inputs, self._logits(inputs, num_rows), strict=True):
                    for i in requests_by_input[ids]:
                        key, _, continuation = requests[i]
                        answers[i] = score_continuation(logits, continuation)
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, answers[i])
                    bar.update(len(requests_by_input[ids]))
        return [answers[i] for i in range(len(requests))]

    def _model_input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the model input that predicts a continuation: all tokens but the last."""
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, allowed: 1 to {self.max_length}; "
                "an empty continuation, or tokens that merge with the context, give 0: start the "
                "continuation with a space"
            )
        whole = (context or [self.prefix_token_id]) + continuation
        return tuple(keep_last(self.max_length + 1, whole)[:-1])

    @torch.inference_mode()
    def _logits(self, inputs: Sequence[tuple[int, ...]], num_rows: list[int]) -> tuple[Tensor, ...]:
        """Return the last `num_rows` rows of logits per input, which is padded on the right."""
        shape = len(inputs), max(map(len, inputs))
        tokens, rows = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for i, (ids, count) in enumerate(zip(inputs, num_rows, strict=True)):
            tokens[i, : len(ids)] = torch.tensor(ids)
            rows[i, len(ids) - count : len(ids)] = True
        device = self.llm.model.norm.weight.device
        logits = self.llm.model(tokens.to(device), logits_at=rows.to(device))
        return logits.split(num_rows)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a dialog; without a generation prompt the last message stays open."""
        chat, options = self.llm.require_chat(), {"add_generation_prompt": add_generation_prompt}
        ids = chat.encode(chat_history, date=self.date, **options)
        text = chat.tokenizer.decode(ids)
        return text if add_generation_prompt else text.removesuffix(Control.EOT.value)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of the chat format, for the record of results."""
        return f"llama32 {self.llm.require_chat().style}"

    @property
    def tokenizer_name(self) -> str:
        """Name of the harness's cache file for rendered chats: chat format and date."""
        return f"{self.chat_template()} {self.date}".replace(" ", "-")


def keep_last(max_ids: int, ids: list[int]) -> list[int]:
    """Return the last ids; logs a warning if ids are cut."""
    if len(ids) > max_ids:
        log.warning("%d tokens are cut to the last %d", len(ids), max_ids)
    return ids[-max_ids:]


def score_continuation(logits: Tensor, continuation: Sequence[int]) -> Answer:
    """Return log p and greediness of the continuation that the last rows predict.

    The sum is in fp64, because a long text reaches sums whose fp32 step is large: 4.9e-4 at -4,192.
    """
    rows = logits[-len(continuation) :].float()
    targets = torch.tensor(continuation, device=rows.device)
    total = -F.cross_entropy(rows, targets, reduction="none").double().sum().item()
    if not math.isfinite(total):
        raise FloatingPointError("the model's logits hold nan or infinity: are its weights sound?")
    return total, rows.argmax(-1).equal(targets)


def to_sampling(gen_kwargs: Mapping[str, Any]) -> Sampling:
    """Convert a task's `generation_kwargs`; raises ValueError for unsupported keys."""
    settings: dict[str, Any] = {"temperature": 0.0}
    settings.update(normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_MAX_GEN_TOKS))
    del settings["do_sample"]  # already part of the temperature
    settings["stop"] = [text for text in settings.pop("until") or () if text]
    settings["max_new_tokens"] = settings.pop("max_gen_toks")
    if unknown := settings.keys() - SAMPLING_FIELDS:
        raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} not supported")
    return Sampling(**settings)
