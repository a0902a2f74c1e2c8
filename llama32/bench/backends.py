"""Benchmark backends: llama32, transformers and llama.cpp behind the same methods.

Each backend decodes greedily with its own KV cache. Peers are imported only when measured.
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

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.settings import EngineSettings
from llama32.kernels.packed_linear import PackedLinear
from llama32.llm.loading import load_model
from llama32.sampling_params import Sampling

WARMUP_STEPS = 3  # not timed


class Backend(Protocol):
    """A program that runs a model; the constructor loads the weights."""

    nbytes: int  # of the weights: a decode step reads all of them

    def first_token(self) -> None:
        """Compute the logits after a single token."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Return the seconds from an empty cache to the first token after a prompt."""
        ...

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Return the median seconds of a decode step for a batch of prompts."""
        ...


def median_step(step: Callable[[], Any], steps: int) -> float:
    """Return the median seconds of `steps` calls after the warm-up."""
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights, packed or plain; tied weights count once."""
    packed = [part for part in model.modules() if isinstance(part, PackedLinear)]
    plain = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    return sum(part.nbytes for part in packed) + sum(plain.values())


class Llama32Backend:
    """llama32 in one of the weight formats of `WeightFormat`.

    "plain", "compiled" and "optimized" keep the stored dtype; "int8" and "int4" are optimized too.
    """

    def __init__(self, folder: Path, weight_format: str) -> None:
        as_stored = weight_format in ("plain", "compiled", "optimized")
        self.is_compiled = weight_format == "compiled"
        self.model = load_model(
            folder,
            quantize=None if as_stored else weight_format,
            optimize=weight_format not in ("plain", "compiled"),
        )
        self.nbytes = weight_bytes(self.model)

    def first_token(self) -> None:
        if self.is_compiled:  # includes the compilation that a first request waits for
            self.prefill([1])
        else:
            with torch.inference_mode():
                self.model(torch.ones(1, 1, dtype=torch.long))

    def make_engine(self, tokens: int) -> Engine:
        """Return an engine with an empty cache for `tokens` tokens."""
        settings = EngineSettings(cache_tokens=tokens, compiled=self.is_compiled)
        engine = Engine.of(self.model, settings)
        engine.warm_up()
        return engine

    def add_request(self, engine: Engine, prompt: Sequence[int], tokens: int) -> Request:
        """Add a request that generates exactly `tokens` tokens."""
        greedy = Sampling(temperature=0, max_new_tokens=tokens, ignore_eos=True)
        return engine.add(prompt, greedy)

    def prefill(self, prompt: Sequence[int]) -> float:
        engine = self.make_engine(len(prompt) + 128)
        request = self.add_request(engine, prompt, 1)
        start = time.perf_counter()
        engine.wait(request, 0)
        return time.perf_counter() - start

    def start_decoding(self, prompts: Sequence[Sequence[int]], steps: int) -> Engine:
        """Return an engine that has read all prompts, with cache for the warm-up and `steps`."""
        tokens = steps + WARMUP_STEPS + 64
        engine = self.make_engine(sum(len(prompt) + tokens + 128 for prompt in prompts))
        for prompt in prompts:
            self.add_request(engine, prompt, tokens)
        while engine.stats.generated < len(prompts) or engine.stats.waiting:
            engine.step()
        return engine

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        return median_step(self.start_decoding(prompts, steps).step, steps)


class TransformersBackend:
    """The model of transformers with a dynamic cache, stepped by hand; prompts of equal length."""

    def __init__(self, folder: Path, weight_format: str) -> None:
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        dtype = "auto" if weight_format == "as stored" else getattr(torch, weight_format)
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
        return median_step(partial(next, self.decode_steps(prompts)), steps)

    def decode_steps(self, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Decode a token for every prompt with each `next`."""
        output = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        while True:
            tokens = output.logits[:, -1:].argmax(-1)
            output = self.model(tokens, past_key_values=output.past_key_values, use_cache=True)
            yield


class LlamaCppBackend:
    """llama.cpp through its C interface, on a GGUF file of the same weights."""

    def __init__(self, folder: Path, weight_format: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.lib: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        file = folder / f"{weight_format}.gguf"
        self.nbytes = file.stat().st_size
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if self.model is None:
            raise OSError(f"{file}: llama.cpp cannot load the file")
        vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(vocabulary)

    def make_context(self, sequences: int, tokens: int) -> Any:
        """Return a llama.cpp context for a number of sequences with `tokens` tokens each."""
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = sequences * tokens
        settings.n_seq_max = sequences
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        return self.lib.llama_init_from_model(self.model, settings)

    def decode_batch(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run at most 512 rows of (token, position, sequence, whether to compute logits)."""
        batch = self.lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, has_logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, has_logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")

    def read_prompt(self, context: Any, prompt: Sequence[int], sequence: int) -> None:
        """Prefill a sequence, with logits for the last token alone."""
        last = len(prompt) - 1
        rows = [(token, i, sequence, i == last) for i, token in enumerate(prompt)]
        for start in range(0, len(rows), 512):
            self.decode_batch(context, rows[start : start + 512])

    def argmax_token(self, context: Any, row: int) -> int:
        """Return the most likely token after a row of the last `decode_batch`."""
        logits = self.lib.llama_get_logits_ith(context, row)
        array = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents
        return int(torch.frombuffer(array, dtype=torch.float32).argmax())

    def first_token(self) -> None:
        context = self.make_context(1, 256)
        self.read_prompt(context, [1], 0)
        self.lib.llama_free(context)

    def prefill(self, prompt: Sequence[int]) -> float:
        context = self.make_context(1, len(prompt) + 128)
        start = time.perf_counter()
        self.read_prompt(context, prompt, 0)
        self.argmax_token(context, -1)
        seconds = time.perf_counter() - start
        self.lib.llama_free(context)
        return seconds

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        context = self.make_context(len(prompts), len(prompts[0]) + steps + WARMUP_STEPS + 64)
        seconds = median_step(partial(next, self.decode_steps(context, prompts)), steps)
        self.lib.llama_free(context)
        return seconds

    def decode_steps(self, context: Any, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Decode a token for every prompt with each `next`."""
        tokens = []
        for sequence, prompt in enumerate(prompts):
            self.read_prompt(context, prompt, sequence)
            tokens.append(self.argmax_token(context, -1))
        for position in count(len(prompts[0])):
            self.decode_batch(
                context, [(token, position, i, True) for i, token in enumerate(tokens)]
            )
            tokens = [self.argmax_token(context, i) for i in range(len(tokens))]
            yield


BACKENDS: dict[str, Callable[[Path, str], Backend]] = {
    "llama32": Llama32Backend,
    "transformers": TransformersBackend,
    "llama.cpp": LlamaCppBackend,
}
