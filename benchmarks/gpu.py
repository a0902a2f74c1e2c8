"""Decoding and reading prompts on a GPU, beside transformers and what the memory can deliver.

python benchmarks/gpu.py 1B [--batches 1 8 64] [--prompts 2048 16384 100000] [--runs 3] [--save]

Decoding: so many requests, each after a prompt of 512 tokens; the median of 50 steps, each with its
sampling (greedy) and a wait for the device. GB/s are the bytes that a step cannot do without: all
weights once, and the keys and values of every context. They are compared with what a copy of 2 GiB
moves in the same run, reading and writing. transformers steps its model by hand, with a dynamic
cache, over the same prompts.

Prompts: one request up to its first token, with nothing remembered. transformers takes it whole.

How turns are taken and disturbed runs rejected: see measuring.py.
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
from measuring import RESULTS, circumstances, keep, table, timings
from throughput import load, sampling, theirs

from llama32.bench.turns import Peer, Run, disturbance, median, take_turns
from llama32.cache import bytes_per_token
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.model import Llama

CONTEXT, STEPS = 512, 50


def prompts(model: Llama, count: int, length: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    size = model.config.vocab_size
    return [[draw.randrange(size) for _ in range(length)] for _ in range(count)]


def timed(device: str, step: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(device, lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / statistics.median(seconds)


def decoding(model: Llama, device: str, batch: int, **settings: Any) -> Peer:
    def run() -> tuple[float, None]:
        room = batch * (CONTEXT + STEPS + 256)
        engine = Engine.of(model, EngineSettings(max_running=64, cache_tokens=room, **settings))
        for prompt in prompts(model, batch, CONTEXT):
            engine.add(prompt, sampling(STEPS + 128))
        while engine.stats.generated < batch:
            engine.step()
        for _ in range(3):
            engine.step()
        assert engine.stats.running == batch
        seconds = statistics.median(timed(device, engine.step) for _ in range(STEPS))
        engine.close()
        return seconds, None

    return run


def their_decoding(ours: Llama, model: Any, device: str, batch: int) -> Peer:
    @torch.inference_mode()
    def run() -> tuple[float, None]:
        ids = torch.tensor(prompts(ours, batch, CONTEXT), device=device)
        state = model(ids, use_cache=True, logits_to_keep=1)

        def step() -> None:
            nonlocal state
            chosen = state.logits[:, -1:].argmax(-1)
            state = model(chosen, past_key_values=state.past_key_values, use_cache=True)
            chosen.tolist()  # a caller wants to see it

        for _ in range(3):
            step()
        return statistics.median(timed(device, step) for _ in range(STEPS)), None

    return run


def reading(model: Llama, device: str, length: int, **settings: Any) -> Peer:
    def run() -> tuple[float, None]:
        engine = Engine.of(model, EngineSettings(cache_tokens=length + 256, **settings))
        request = engine.add(prompts(model, 1, length)[0], sampling(1))
        seconds = timed(device, lambda: engine.wait(request, 0))
        engine.close()
        return seconds, None

    return run


def their_reading(ours: Llama, model: Any, device: str, length: int) -> Peer:
    @torch.inference_mode()
    def run() -> tuple[float, None]:
        ids = torch.tensor(prompts(ours, 1, length), device=device)
        return timed(device, lambda: model(ids, use_cache=True, logits_to_keep=1)), None

    return run


def decoding_peers(model: Llama, its: Any, device: str, batch: int) -> dict[str, Peer]:
    on_gpu = device.startswith("cuda")
    peers = {"eager": decoding(model, device, batch, deterministic=False, cuda_graphs=False)}
    if on_gpu:
        peers["graphs"] = decoding(model, device, batch, deterministic=False, cuda_graphs=True)
    peers["deterministic"] = decoding(model, device, batch, deterministic=True)
    return peers | {"transformers": their_decoding(model, its, device, batch)}


def reading_peers(model: Llama, its: Any, device: str, length: int) -> dict[str, Peer]:
    peers = {
        f"{chunk} tokens a step": reading(
            model, device, length, deterministic=False, prefill_tokens=chunk
        )
        for chunk in (512, 4096)
    }
    peers["deterministic"] = reading(model, device, length, deterministic=True)
    return peers | {"transformers": their_reading(model, its, device, length)}


def decoding_rows(
    model: Llama, found: dict[str, list[Run]], batch: int, bandwidth: float
) -> list[list[str]]:
    weights = sum(x.nbytes for x in model.parameters())
    context = CONTEXT + STEPS / 2
    needed = weights + batch * context * bytes_per_token(model.config, model.norm.weight.dtype)
    rows = []
    for name, runs in found.items():
        rate = needed / median(runs)
        tokens = f"{batch / median(runs):,.0f}"
        rows.append([f"{batch}", name, tokens, f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.0%}"])
    return rows


def report_of(
    model: Llama, device: str, batches: Sequence[int], lengths: Sequence[int], runs: int
) -> tuple[str, dict[str, Any]]:
    bandwidth, its = copy_bandwidth(device), theirs(model)
    decoded, read, every = [], [], {}
    for batch in batches:
        found = take_turns(decoding_peers(model, its, device, batch), runs)
        every |= {f"decoding {batch}, {name}": its_runs for name, its_runs in found.items()}
        decoded += decoding_rows(model, found, batch, bandwidth)
    for length in lengths:
        found = take_turns(reading_peers(model, its, device, length), runs)
        every |= {f"prompt {length}, {name}": its_runs for name, its_runs in found.items()}
        read += [
            [f"{length:,}", name, f"{length / median(its_runs):,.0f}", f"{median(its_runs):.3f}"]
            for name, its_runs in found.items()
        ]
    report = (
        f"Decoding after {CONTEXT} tokens; a copy moves {bandwidth / 1e9:,.0f} GB/s.\n\n"
        f"{table(['batch', '', 'tokens/s', 'GB/s', 'of the copy'], decoded)}\n\n"
        f"Prompts up to the first token.\n\n"
        f"{table(['tokens', '', 'tokens/s', 'seconds'], read)}\n\n{disturbance(every)}."
    )
    return report, {"copy, bytes per second": bandwidth, "runs": timings(every)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding and prefill on a GPU.")
    parser.add_argument("model", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 16384, 100_000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    model = load(options.model, getattr(torch, options.dtype), options.device)
    name = Path(options.model).name
    report, found = report_of(model, options.device, options.batches, options.prompts, options.runs)
    report = f"{name}, {options.dtype}, {options.device}.\n\n{report}"
    print(report)
    if options.save:
        lists = (("batches", options.batches), ("prompts", options.prompts))
        numbers = " ".join(f"--{key} {' '.join(map(str, values))}" for key, values in lists)
        command = (
            f"benchmarks/gpu.py {name} --device {options.device} --dtype {options.dtype} "
            f"{numbers} --runs {options.runs} --save"
        )
        kept = circumstances(command, ("torch", "transformers"), options.device)
        keep(f"gpu_{name}_{options.dtype}", report, kept, found)


if __name__ == "__main__":
    main()
