"""Savings of the prefix cache: computed prompt tokens, and time to the first token.

python benchmarks/prefix.py [model] [--shared 1000] [--runs 3] [--save]

32 requests share a prefix of `--shared` tokens, end with 8-32 different tokens, and generate 8
tokens each. For comparison, the same requests run with a different first token each, and share no
prefix. A single prompt of `--shared` tokens is timed up to the first token: with an empty prefix
cache (a miss), and right after the same prompt (a hit). Except for the hit, the cache is emptied
before each run. measuring.py explains turns and rejected runs.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from make_random import SHAPES
from measuring import RESULTS, bf16_note, provenance, save_result, table, timings
from throughput import greedy_sampling, load

from llama32.bench.interleave import TimedCall, disturbance, interleave_in_process, median_seconds
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings

REQUESTS, NEW_TOKENS = 32, 8


def workload(vocabulary: int, shared: int, *, is_shared: bool, seed: int = 0) -> list[list[int]]:
    """Return prompts whose lengths and contents, except the first tokens, ignore `is_shared`."""
    rng = random.Random(seed)
    prefix = [rng.randrange(vocabulary) for _ in range(shared)]
    prompts: list[list[int]] = []
    for i in range(REQUESTS):
        suffix = [rng.randrange(vocabulary) for _ in range(rng.randint(8, 32))]
        prompts.append([prefix[0] if is_shared else i, *prefix[1:], *suffix])
    return prompts


def workload_call(engine: Engine, prompts: list[list[int]]) -> TimedCall:
    """Return a call of all requests from an empty cache; the result is the computed tokens."""

    def run() -> tuple[float, int]:
        engine.forget_prefixes()
        before = engine.stats.prompt_computed
        start = time.perf_counter()
        for prompt in prompts:
            engine.add(prompt, greedy_sampling(NEW_TOKENS))
        while engine.is_busy:
            engine.step()
        return time.perf_counter() - start, engine.stats.prompt_computed - before

    return run


def prompt_call(engine: Engine, prompt: list[int], *, is_hit: bool) -> TimedCall:
    """Return a call up to the first token; the result is the number of cached tokens."""

    def run() -> tuple[float, int]:
        if not is_hit:
            engine.forget_prefixes()
        start = time.perf_counter()
        request = engine.add(prompt, greedy_sampling(1))
        engine.wait(request, 0)
        return time.perf_counter() - start, request.num_cached

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the savings of the prefix cache.")
    parser.add_argument("model", nargs="?", default="135M", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shared", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    model = load(options.model, getattr(torch, options.dtype))
    engine = Engine.of(model, EngineSettings())
    vocabulary = model.config.vocab_size
    prompts = {
        "shared prefix": workload(vocabulary, options.shared, is_shared=True),
        "no shared prefix": workload(vocabulary, options.shared, is_shared=False),
    }
    together = interleave_in_process(
        {name: workload_call(engine, batch) for name, batch in prompts.items()}, options.runs
    )
    single = interleave_in_process(
        {
            "miss": prompt_call(
                engine, prompts["shared prefix"][0][: options.shared], is_hit=False
            ),
            "hit": prompt_call(engine, prompts["shared prefix"][0][: options.shared], is_hit=True),
        },
        3 * options.runs,
    )
    shared, separate = together.values()
    computed = [runs[0].result for runs in (shared, separate)]
    total = sum(map(len, prompts["no shared prefix"]))
    rows = [
        [name, f"{total:,}", f"{runs[0].result:,}", f"{median_seconds(runs):,.2f}"]
        for name, runs in together.items()
    ]
    rows.append(
        [
            "ratio",
            "",
            f"{computed[1] / computed[0]:.1f}",
            f"{median_seconds(separate) / median_seconds(shared):.1f}",
        ]
    )
    first = [
        [name, f"{options.shared:,}", f"{runs[0].result:,}", f"{1000 * median_seconds(runs):,.1f}"]
        for name, runs in single.items()
    ]
    hit = median_seconds(single["hit"]) / median_seconds(single["miss"])
    name = Path(options.model).name
    is_deterministic = "" if engine.deterministic else "not "
    report = (
        f"{name}, {options.dtype}, engine {is_deterministic}deterministic: {REQUESTS} requests, "
        f"{options.shared:,} tokens shared, 8-32 different, {NEW_TOKENS} generated.\n\n"
        f"{table(['', 'prompt tokens', 'computed', 'seconds'], rows)}\n\n"
        f"One request up to the first token:\n\n"
        f"{table(['', 'prompt tokens', 'cached', 'ms'], first)}\n\n"
        f"A hit takes {hit:.1%} of a miss. {disturbance(together | single)}."
    )
    if options.dtype == "bfloat16":
        report = f"{report} {bf16_note()}".rstrip()
    print(report)
    if options.save:
        command = (
            f"benchmarks/prefix.py {name} --dtype {options.dtype} --shared {options.shared} "
            f"--runs {options.runs} --save"
        )
        data = {
            "prompt_tokens": total,
            "computed": dict(zip(together, computed, strict=True)),
            "runs": timings(together | single),
        }
        save_result(f"prefix_{name}_{options.dtype}", report, provenance(command), data)


if __name__ == "__main__":
    main()
