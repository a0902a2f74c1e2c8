"""Cost of a longer context per decode step, compared with reading the keys and values.

python benchmarks/context.py 1B [--contexts 0 4096 16384 65536] [--runs 5] [--save]

One sequence decodes over a cache filled with noise: the values do not affect the time, and real
values would take hours to compute. GB/s are the bytes of the context's keys and values divided by
the extra time of a step relative to an empty context.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from make_random import SHAPES
from measuring import RESULTS, bf16_note, provenance, save_result, table, timings
from throughput import load

from llama32.bench.interleave import Run, disturbance, interleave_in_process, median_seconds
from llama32.cache.batch import Span
from llama32.cache.int8_kv_cache import Int8Cache, int8_bytes_per_token
from llama32.cache.kv_cache import PagedCache, bytes_per_token
from llama32.generate import forward
from llama32.kernels.autotune import optimize
from llama32.model import Llama

STEPS = 8


def filled_cache(
    model: Llama, kind: type[PagedCache], context: int
) -> tuple[PagedCache, list[int]]:
    """Return a cache of noise for the context and a few more tokens, with all page numbers."""
    pages = -(-(context + STEPS + 1) // 64)
    cache = kind(model.config, pages, 64, dtype=model.norm.weight.dtype)
    for pool in (cache.keys, cache.values):
        if pool.dtype == torch.int8:
            pool.random_(-127, 128)
        else:
            pool.normal_()
    if isinstance(cache, Int8Cache):
        cache.key_scales.fill_(0.02)
        cache.value_scales.fill_(0.02)
    return cache, list(range(pages))


def decode_steps(
    model: Llama, cache: PagedCache, pages: list[int], context: int
) -> tuple[float, None]:
    """Return the mean seconds of a decode step over `STEPS` steps."""
    start = time.perf_counter()
    for i in range(STEPS):
        forward(model, cache, Span([1], context + i, pages))
    return (time.perf_counter() - start) / STEPS, None


def report_rows(
    model: Llama, results: dict[str, list[Run]], contexts: list[int], per_token: dict[str, int]
) -> list[list[str]]:
    rows = []
    for kind, nbytes in per_token.items():
        empty = median_seconds(results[f"{kind}, 0"])
        for context in contexts:
            seconds = median_seconds(results[f"{kind}, {context}"])
            read = f"{context * nbytes / (seconds - empty) / 1e9:.1f}" if context else ""
            rows.append(
                [kind, f"{context:,}", f"{seconds * 1e3:.1f}", f"{seconds / empty:.2f}", read]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of a longer context.")
    parser.add_argument("model", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 4096, 16384, 65536])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    model = load(options.model, torch.bfloat16, "cpu")
    optimize(model)
    kinds: dict[str, type[PagedCache]] = {"bf16": PagedCache, "int8": Int8Cache}
    per_token = {
        "bf16": bytes_per_token(model.config, torch.bfloat16),
        "int8": int8_bytes_per_token(model.config),
    }
    calls: dict[str, Any] = {}
    for kind, cache_kind in kinds.items():
        for context in options.contexts:
            cache = filled_cache(model, cache_kind, context)
            calls[f"{kind}, {context}"] = partial(decode_steps, model, *cache, context)
    results = interleave_in_process(calls, options.runs)
    head = ["cache", "context", "ms a step", "relative to 0", "GB/s of keys and values"]
    name = Path(options.model).name
    report = (
        f"{name}, bf16, one sequence.\n\n"
        f"{table(head, report_rows(model, results, options.contexts, per_token))}\n\n"
        f"{disturbance(results)}. {bf16_note()}"
    ).strip()
    print(report)
    if options.save:
        contexts = " ".join(map(str, options.contexts))
        command = f"benchmarks/context.py {name} --contexts {contexts} --runs {options.runs} --save"
        save_result(f"context_{name}", report, provenance(command), timings(results))


if __name__ == "__main__":
    main()
