"""What a longer context costs a step of decoding, and whether that is more than reading it.

python benchmarks/context.py 1B [--contexts 0 4096 16384 65536] [--runs 5] [--save]

One sequence, one new token, over a cache that is filled with noise: what is in it does not matter
for how long it takes, and to compute it would take hours. GB/s are the keys and values of the
context by the time that a step takes longer than with none.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from make_random import SHAPES
from measuring import RESULTS, bf16_note, circumstances, keep, table, timings
from throughput import load

from llama32.adapt.optimize import optimize
from llama32.batch import Span
from llama32.bench.turns import Run, disturbance, median, take_turns
from llama32.cache import PagedCache, bytes_per_token
from llama32.generate import step
from llama32.int8_cache import Int8Cache, int8_bytes_per_token
from llama32.model import Llama

STEPS = 8


def filled(model: Llama, kind: type[PagedCache], context: int) -> tuple[PagedCache, list[int]]:
    """A cache with room for a few tokens more than the context, and all its pages."""
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


def decoding(model: Llama, cache: PagedCache, pages: list[int], context: int) -> tuple[float, None]:
    """Seconds of a step, over several."""
    start = time.perf_counter()
    for i in range(STEPS):
        step(model, cache, Span([1], context + i, pages))
    return (time.perf_counter() - start) / STEPS, None


def rows_of(
    model: Llama, found: dict[str, list[Run]], contexts: list[int], per_token: dict[str, int]
) -> list[list[str]]:
    rows = []
    for kind, nbytes in per_token.items():
        none = median(found[f"{kind}, 0"])
        for context in contexts:
            seconds = median(found[f"{kind}, {context}"])
            read = f"{context * nbytes / (seconds - none) / 1e9:.1f}" if context else ""
            rows.append(
                [kind, f"{context:,}", f"{seconds * 1e3:.1f}", f"{seconds / none:.2f}", read]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a longer context costs.")
    parser.add_argument("model", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 4096, 16384, 65536])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    model = load(options.model, torch.bfloat16, "cpu")
    optimize(model)
    kinds: dict[str, type[PagedCache]] = {"bf16": PagedCache, "int8": Int8Cache}
    per_token = {
        "bf16": bytes_per_token(model.config, torch.bfloat16),
        "int8": int8_bytes_per_token(model.config),
    }
    peers: dict[str, Any] = {}
    for kind, cache_kind in kinds.items():
        for context in options.contexts:
            cache = filled(model, cache_kind, context)
            peers[f"{kind}, {context}"] = partial(decoding, model, *cache, context)
    found = take_turns(peers, options.runs)
    head = ["cache", "context", "ms a step", "of none", "GB/s of what is read"]
    name = Path(options.model).name
    report = (
        f"{name}, bf16, one sequence.\n\n"
        f"{table(head, rows_of(model, found, options.contexts, per_token))}\n\n"
        f"{disturbance(found)}. {bf16_note()}"
    ).strip()
    print(report)
    if options.save:
        contexts = " ".join(map(str, options.contexts))
        command = f"benchmarks/context.py {name} --contexts {contexts} --runs {options.runs} --save"
        keep(f"context_{name}", report, circumstances(command), timings(found))


if __name__ == "__main__":
    main()
