"""A loaded model, as EleutherAI's lm-evaluation-harness wants it.

    from llama32.harness import Harness

    lm = Harness(llama32.load("tiny"))
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

Once this module is imported, `model="llama32", model_args="model=tiny"` says the same by name.
The begin-of-text token stands before every text exactly once, also where a likelihood is rolled
over one, and in a rendered chat, which brings its own.
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

from llama32.chat import Control
from llama32.llm import LLM
from llama32.loading import load
from llama32.settings import Sampling
from llama32.transcript import Result

MAX_GEN_TOKS = 256  # where a task does not say it, as for the harness's other models
DTYPES = "float32", "bfloat16", "float16"
SETTINGS = {field.name for field in fields(Sampling)}

Answer = tuple[float, bool]  # log p of a continuation, and whether it is what greedy decoding says

log = logging.getLogger(__name__)


@register_model("llama32")
class Harness(TemplateLM):
    """A model of lm-eval: an `LLM`, or the name of one with options of `llama32.load`.

    `batch_size` texts are scored at once, padded to the longest; what is generated runs through
    the engine, which sees to that itself. `max_length` is the most tokens of context and answer,
    by default the model's own: what is longer loses its beginning, and the log tells. A text whose
    likelihood is rolled over all of it has that many rows of logits, in each place of a batch.
    `date` is what a rendered chat says of today: given, the same results can be had tomorrow.
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
                del options["device"]  # lm-eval's command line says cuda where nobody chose
            model = load(model, **options)
        elif dtype or options:
            raise ValueError(f"{', '.join(options) or 'dtype'}: the model is loaded already")
        limit = model.config.max_position_embeddings
        if max_length is not None and not 1 < max_length <= limit:
            raise ValueError(f"max_length is {max_length}, allowed: 2 to the model's {limit}")
        self.llm, self.date = model, date
        self.batch_size, self.max_length = int(batch_size), max_length or limit
        self.begin = model.require_tokenizer().decode([self.prefix_token_id])

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        end = self.llm.require_tokenizer().eos_id
        return self.llm.eos_ids[0] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which all is to be predicted."""
        begins = self.llm.require_tokenizer().bos_id, self.llm.config.bos_token_id
        return next((id for id in begins if id is not None), self.eot_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, the begin token before it where the checkpoint's rule puts one.

        Control tokens are read in what begins with one, that is in a rendered chat: the harness
        hands on text only. In all other texts they are text.
        """
        is_chat = add_special_tokens is None and string.startswith(self.begin)
        bos = not is_chat if add_special_tokens is None else add_special_tokens
        return self.llm.require_tokenizer().encode(string, bos=bos, allow_special=is_chat)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in disjoint windows, of which the last one has a whole context."""
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
        asked = [window for of_text in windows for window in of_text]
        answers = iter(self._loglikelihood_tokens(asked, disable_tqdm))
        return [math.fsum(next(answers)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, all of them together; greedy unless a task samples."""
        prompts, sampling = [], []
        for context, given in (request.arguments for request in requests):
            sampling.append(sampling_of(given))
            room = self.max_length - sampling[-1].max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks {sampling[-1].max_new_tokens} leaves no room for a prompt in "
                    f"the context of {self.max_length}: ask for fewer tokens"
                )
            prompts.append(last(room, self.tok_encode(context) or [self.prefix_token_id]))
        if not prompts:
            return []
        results = self.llm.generate(prompts, sampling, progress=False if disable_tqdm else None)
        return [self._text(*pair) for pair in zip(results, sampling, strict=True)]

    def _text(self, result: Result, sampling: Sampling) -> str:
        """What was said, without control tokens, as the harness's other models give it."""
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
        """The answers to (what to cache one under, context, continuation).

        Choices of one token after the same context ask for the same input, which runs once.
        """
        asking = defaultdict(list)  # input: places of the requests
        for i, (_, context, continuation) in enumerate(requests):
            asking[self._input(context, continuation)].append(i)
        longest_first = sorted(asking, key=len, reverse=True)
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for inputs in chunks(longest_first, self.batch_size):
                wanted = [max(len(requests[i][2]) for i in asking[ids]) for ids in inputs]
                for ids, logits in zip(inputs, self._logits(inputs, wanted), strict=True):
                    for i in asking[ids]:
                        key, _, continuation = requests[i]
                        answers[i] = score(logits, continuation)
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, answers[i])
                    bar.update(len(asking[ids]))
        return [answers[i] for i in range(len(requests))]

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads to predict a continuation: all but its last token."""
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, allowed: 1 to {self.max_length}; "
                "it has none where it is empty, or its tokens merge with those of the context: "
                "let it begin with a space"
            )
        whole = (context or [self.prefix_token_id]) + continuation
        return tuple(last(self.max_length + 1, whole)[:-1])

    @torch.inference_mode()
    def _logits(self, inputs: Sequence[tuple[int, ...]], wanted: list[int]) -> tuple[Tensor, ...]:
        """The last `wanted` rows of each input; no token sees the padding behind it."""
        shape = len(inputs), max(map(len, inputs))
        tokens, rows = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for i, (ids, count) in enumerate(zip(inputs, wanted, strict=True)):
            tokens[i, : len(ids)] = torch.tensor(ids)
            rows[i, len(ids) - count : len(ids)] = True
        device = self.llm.model.norm.weight.device
        logits = self.llm.model(tokens.to(device), rows=rows.to(device))
        return logits.split(wanted)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A dialog as text. Without a generation prompt its last message is one to go on with."""
        chat, options = self.llm.require_chat(), {"add_generation_prompt": add_generation_prompt}
        ids = chat.encode(chat_history, date=self.date, **options)
        text = chat.tokenizer.decode(ids)
        return text if add_generation_prompt else text.removesuffix(Control.EOT.value)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Which format it is, for the record of results: there is no template behind it."""
        return f"llama32 {self.llm.require_chat().render.__name__}"

    @property
    def tokenizer_name(self) -> str:
        """What a rendered chat depends on, which names the file where the harness may keep it."""
        return f"{self.chat_template()} {self.date}".replace(" ", "-")


def last(most: int, ids: list[int]) -> list[int]:
    """As many ids as there is room for; where that is not all, the log tells."""
    if len(ids) > most:
        log.warning("%d tokens are cut to the last %d", len(ids), most)
    return ids[-most:]


def score(logits: Tensor, continuation: Sequence[int]) -> Answer:
    """Of the continuation that the last rows of logits predict."""
    rows = logits[-len(continuation) :].float()
    targets = torch.tensor(continuation, device=rows.device)
    total = -F.cross_entropy(rows, targets, reduction="sum").item()
    if not math.isfinite(total):
        raise FloatingPointError("the model's logits hold nan or infinity: are its weights sound?")
    return total, rows.argmax(-1).equal(targets)


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """What a task's `generation_kwargs` mean here. ValueError for what they cannot."""
    settings: dict[str, Any] = {"temperature": 0.0}
    settings.update(normalize_gen_kwargs(dict(given), MAX_GEN_TOKS))
    del settings["do_sample"]  # the temperature has heard of it
    settings["stop"] = [text for text in settings.pop("until") or () if text]
    settings["max_new_tokens"] = settings.pop("max_gen_toks")
    if unknown := settings.keys() - SETTINGS:
        raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} cannot be done here")
    return Sampling(**settings)
