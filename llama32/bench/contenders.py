"""What is measured: this package in its forms, and its peers, all with the same few methods.

Each decodes greedily and keeps its own cache. Peers are imported when they are asked for.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch

from llama32.adapt.packed import PackedLinear
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings
from llama32.loading import load_model
from llama32.settings import Sampling

STEADY = 3  # steps before those that count


class Contender(Protocol):
    """A model, loaded by its constructor, that reads prompts and decodes."""

    nbytes: int  # of its weights, all of which a step of decoding reads

    def first_token(self) -> None:
        """The logits after one token."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds to read a prompt up to its next token, with nothing remembered."""
        ...

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Seconds of a step that gives each prompt its next token; the median of so many."""
        ...


def median_step(step: Callable[[], Any], steps: int) -> float:
    """Of the steps that come after the first few."""
    for _ in range(STEADY):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all weights, in whatever form; once, where an embedding shares them with the head."""
    packed = [part for part in model.modules() if isinstance(part, PackedLinear)]
    plain = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    return sum(part.nbytes for part in packed) + sum(plain.values())


class Ours:
    """llama32 as it is stored, "plain", "compiled" or "optimized"; or optimized in "int8" or
    "int4"."""

    def __init__(self, folder: Path, form: str) -> None:
        as_stored = form in ("plain", "compiled", "optimized")
        self.is_compiled = form == "compiled"
        self.model = load_model(
            folder,
            quantize=None if as_stored else form,
            optimize=form not in ("plain", "compiled"),
        )
        self.nbytes = weight_bytes(self.model)

    def first_token(self) -> None:
        if self.is_compiled:  # what a first request would wait for
            self.prefill([1])
        else:
            with torch.inference_mode():
                self.model(torch.ones(1, 1, dtype=torch.long))

    def engine(self, tokens: int) -> Engine:
        """With an empty cache of that size."""
        settings = EngineSettings(cache_tokens=tokens, compiled=self.is_compiled)
        engine = Engine.of(self.model, settings)
        engine.warm_up()
        return engine

    def add(self, engine: Engine, prompt: Sequence[int], tokens: int) -> Request:
        """A request that goes on, whatever comes."""
        greedy = Sampling(temperature=0, max_new_tokens=tokens, ignore_eos=True)
        return engine.add(prompt, greedy)

    def prefill(self, prompt: Sequence[int]) -> float:
        engine = self.engine(len(prompt) + 128)
        request = self.add(engine, prompt, 1)
        start = time.perf_counter()
        engine.wait(request, 0)
        return time.perf_counter() - start

    def decoding(self, prompts: Sequence[Sequence[int]], steps: int) -> Engine:
        """One in which each prompt has its first token, with room for so many more steps."""
        tokens = steps + STEADY + 64
        engine = self.engine(sum(len(prompt) + tokens + 128 for prompt in prompts))
        for prompt in prompts:
            self.add(engine, prompt, tokens)
        while engine.stats.generated < len(prompts) or engine.stats.waiting:
            engine.step()
        return engine

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        return median_step(self.decoding(prompts, steps).step, steps)


class Transformers:
    """Its model, stepped by hand with its dynamic cache; all prompts of one length."""

    def __init__(self, folder: Path, form: str) -> None:
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        dtype = "auto" if form == "as stored" else getattr(torch, form)
        self.model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        self.nbytes = sum(weight.nbytes for weight in self.model.parameters())

    @torch.inference_mode()
    def first_token(self) -> None:
        self.model(torch.ones(1, 1, dtype=torch.long))

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> float:
        start = time.perf_counter()
        self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        return median_step(partial(next, self.steps(prompts)), steps)

    def steps(self, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """One token more for each, with every `next`."""
        state = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        while True:
            chosen = state.logits[:, -1:].argmax(-1)
            state = self.model(chosen, past_key_values=state.past_key_values, use_cache=True)
            yield


class LlamaCpp:
    """llama.cpp through its own C interface, on a GGUF file of the same weights."""

    def __init__(self, folder: Path, form: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.lib: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        file = folder / f"{form}.gguf"
        self.nbytes = file.stat().st_size
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if self.model is None:
            raise OSError(f"{file}: llama.cpp does not load it")
        vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(vocabulary)

    def context(self, sequences: int, tokens: int) -> Any:
        """With room for so many sequences of so many tokens."""
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = sequences * tokens
        settings.n_seq_max = sequences
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        return self.lib.llama_init_from_model(self.model, settings)

    def run(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) at once, at most 512."""
        batch = self.lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        failed = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")

    def read(self, context: Any, prompt: Sequence[int], sequence: int) -> None:
        last = len(prompt) - 1
        rows = [(token, i, sequence, i == last) for i, token in enumerate(prompt)]
        for start in range(0, len(rows), 512):
            self.run(context, rows[start : start + 512])

    def best(self, context: Any, row: int) -> int:
        """The likeliest token after a row of the last call."""
        logits = self.lib.llama_get_logits_ith(context, row)
        array = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents
        return int(torch.frombuffer(array, dtype=torch.float32).argmax())

    def first_token(self) -> None:
        context = self.context(1, 256)
        self.read(context, [1], 0)
        self.lib.llama_free(context)

    def prefill(self, prompt: Sequence[int]) -> float:
        context = self.context(1, len(prompt) + 128)
        start = time.perf_counter()
        self.read(context, prompt, 0)
        self.best(context, -1)
        seconds = time.perf_counter() - start
        self.lib.llama_free(context)
        return seconds

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        context = self.context(len(prompts), len(prompts[0]) + steps + STEADY + 64)
        seconds = median_step(partial(next, self.steps(context, prompts)), steps)
        self.lib.llama_free(context)
        return seconds

    def steps(self, context: Any, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """One token more for each, with every `next`."""
        tokens = []
        for sequence, prompt in enumerate(prompts):
            self.read(context, prompt, sequence)
            tokens.append(self.best(context, -1))
        for position in count(len(prompts[0])):
            self.run(context, [(token, position, i, True) for i, token in enumerate(tokens)])
            tokens = [self.best(context, i) for i in range(len(tokens))]
            yield


KINDS: dict[str, Callable[[Path, str], Contender]] = {
    "llama32": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}
