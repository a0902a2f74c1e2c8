"""Decoding and prefill on a GPU, compared with transformers and with the memory bandwidth.

python benchmarks/gpu.py 1B [--batches 1 8 64] [--prompts 2048 16384 100000] [--runs 3] [--save]

Decoding: a batch of requests after prompts of 512 tokens; the median of 50 steps, each with greedy
sampling and a wait for the device. GB/s count the bytes that every step must read: all weights
once, and the keys and values of every context. The reference is the bandwidth of a copy of 2 GiB
in the same process, reading plus writing. transformers decodes the same prompts with a dynamic
cache.

Prefill: a single request up to the first token, with an empty prefix cache. transformers prefills
the prompt in a single call.

measuring.py explains turns and rejected runs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from make_random import SHAPES
from measuring import RESULTS, provenance, save_result, table, timings
from throughput import greedy_sampling, load, transformers_model

from llama32.bench.interleave import (
    Run,
    TimedCall,
    disturbance,
    interleave_in_process,
    median_seconds,
)
from llama32.cache.kv_cache import bytes_per_token
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.model import Llama

CONTEXT, STEPS = 512, 50


def random_prompts(model: Llama, count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    size = model.config.vocab_size
    return [[rng.randrange(size) for _ in range(length)] for _ in range(count)]


def timed(device: str, step: Callable[[], Any]) -> float:
    """Return the seconds until the device has finished a step."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def copy_bandwidth(device: str) -> float:
    """Return bytes per second of a copy, reads and writes both counted."""
    source = torch.ones(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(device, lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / statistics.median(seconds)


def decode_call(model: Llama, device: str, batch: int, **settings: Any) -> TimedCall:
    def run() -> tuple[float, None]:
        cache_tokens = batch * (CONTEXT + STEPS + 256)
        engine = Engine.of(
            model, EngineSettings(max_running=64, cache_tokens=cache_tokens, **settings)
        )
        for prompt in random_prompts(model, batch, CONTEXT):
            engine.add(prompt, greedy_sampling(STEPS + 128))
        while engine.stats.generated < batch:
            engine.step()
        for _ in range(3):
            engine.step()
        assert engine.stats.running == batch
        seconds = statistics.median(timed(device, engine.step) for _ in range(STEPS))
        engine.close()
        return seconds, None

    return run


def transformers_decode_call(model: Llama, peer: Any, device: str, batch: int) -> TimedCall:
    @torch.inference_mode()
    def run() -> tuple[float, None]:
        ids = torch.tensor(random_prompts(model, batch, CONTEXT), device=device)
        output = peer(ids, use_cache=True, logits_to_keep=1)

        def step() -> None:
            nonlocal output
            tokens = output.logits[:, -1:].argmax(-1)
            output = peer(tokens, past_key_values=output.past_key_values, use_cache=True)
            tokens.tolist()  # copied to the host, as a caller needs

        for _ in range(3):
            step()
        return statistics.median(timed(device, step) for _ in range(STEPS)), None

    return run


def prefill_call(model: Llama, device: str, length: int, **settings: Any) -> TimedCall:
    def run() -> tuple[float, None]:
        engine = Engine.of(model, EngineSettings(cache_tokens=length + 256, **settings))
        request = engine.add(random_prompts(model, 1, length)[0], greedy_sampling(1))
        seconds = timed(device, lambda: engine.wait(request, 0))
        engine.close()
        return seconds, None

    return run


def transformers_prefill_call(model: Llama, peer: Any, device: str, length: int) -> TimedCall:
    @torch.inference_mode()
    def run() -> tuple[float, None]:
        ids = torch.tensor(random_prompts(model, 1, length), device=device)
        return timed(device, lambda: peer(ids, use_cache=True, logits_to_keep=1)), None

    return run


def decode_calls(model: Llama, peer: Any, device: str, batch: int) -> dict[str, TimedCall]:
    on_gpu = device.startswith("cuda")
    calls = {"eager": decode_call(model, device, batch, deterministic=False, cuda_graphs=False)}
    if on_gpu:
        calls["graphs"] = decode_call(model, device, batch, deterministic=False, cuda_graphs=True)
    calls["deterministic"] = decode_call(model, device, batch, deterministic=True)
    return calls | {"transformers": transformers_decode_call(model, peer, device, batch)}


def prefill_calls(model: Llama, peer: Any, device: str, length: int) -> dict[str, TimedCall]:
    calls = {
        f"{chunk} tokens a step": prefill_call(
            model, device, length, deterministic=False, prefill_tokens=chunk
        )
        for chunk in (512, 4096)
    }
    calls["deterministic"] = prefill_call(model, device, length, deterministic=True)
    return calls | {"transformers": transformers_prefill_call(model, peer, device, length)}


def decode_rows(
    model: Llama, results: dict[str, list[Run]], batch: int, bandwidth: float
) -> list[list[str]]:
    weights = sum(x.nbytes for x in model.parameters())
    context = CONTEXT + STEPS / 2
    nbytes = weights + batch * context * bytes_per_token(model.config, model.norm.weight.dtype)
    rows = []
    for name, runs in results.items():
        rate = nbytes / median_seconds(runs)
        tokens = f"{batch / median_seconds(runs):,.0f}"
        rows.append([f"{batch}", name, tokens, f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.0%}"])
    return rows


def make_report(
    model: Llama, device: str, batches: Sequence[int], lengths: Sequence[int], runs: int
) -> tuple[str, dict[str, Any]]:
    bandwidth, peer = copy_bandwidth(device), transformers_model(model)
    decoded, prefilled, all_runs = [], [], {}
    for batch in batches:
        results = interleave_in_process(decode_calls(model, peer, device, batch), runs)
        all_runs |= {f"decoding {batch}, {name}": each for name, each in results.items()}
        decoded += decode_rows(model, results, batch, bandwidth)
    for length in lengths:
        results = interleave_in_process(prefill_calls(model, peer, device, length), runs)
        all_runs |= {f"prompt {length}, {name}": each for name, each in results.items()}
        medians = {name: median_seconds(each) for name, each in results.items()}
        prefilled += [
            [f"{length:,}", name, f"{length / seconds:,.0f}", f"{seconds:.3f}"]
            for name, seconds in medians.items()
        ]
    report = (
        f"Decoding after {CONTEXT} tokens; a copy moves {bandwidth / 1e9:,.0f} GB/s.\n\n"
        f"{table(['batch', '', 'tokens/s', 'GB/s', 'of the copy'], decoded)}\n\n"
        f"Prompts up to the first token.\n\n"
        f"{table(['tokens', '', 'tokens/s', 'seconds'], prefilled)}\n\n{disturbance(all_runs)}."
    )
    return report, {"copy, bytes per second": bandwidth, "runs": timings(all_runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding and prefill on a GPU.")
    parser.add_argument("model", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 16384, 100_000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    model = load(options.model, getattr(torch, options.dtype), options.device)
    name = Path(options.model).name
    report, results = make_report(
        model, options.device, options.batches, options.prompts, options.runs
    )
    report = f"{name}, {options.dtype}, {options.device}.\n\n{report}"
    print(report)
    if options.save:
        lists = (("batches", options.batches), ("prompts", options.prompts))
        numbers = " ".join(f"--{key} {' '.join(map(str, values))}" for key, values in lists)
        command = (
            f"benchmarks/gpu.py {name} --device {options.device} --dtype {options.dtype} "
            f"{numbers} --runs {options.runs} --save"
        )
        source = provenance(command, ("torch", "transformers"), options.device)
        save_result(f"gpu_{name}_{options.dtype}", report, source, results)


if __name__ == "__main__":
    main()
