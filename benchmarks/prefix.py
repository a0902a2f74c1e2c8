"""What sharing a prompt's beginning saves: prompt tokens computed, and the time to a first token.

python benchmarks/prefix.py [model] [--shared 1000] [--runs 3] [--save]

32 requests begin with the same `--shared` tokens and end with 8-32 of their own, generating 8
tokens each; beside them the same requests, each with another first token, so that none can share
anything. And a single prompt of `--shared` tokens up to its first token: with nothing remembered
(a miss), and right after itself (a hit). The cache is empty before each run, but for the hit. How
turns are taken and disturbed runs rejected: see measuring.py.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from make_random import SHAPES
from measuring import RESULTS, bf16_note, circumstances, keep, table, timings
from throughput import load, sampling

from llama32.bench.turns import Peer, disturbance, median, take_turns
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings

REQUESTS, NEW_TOKENS = 32, 8


def workload(vocabulary: int, shared: int, *, is_shared: bool, seed: int = 0) -> list[list[int]]:
    """Prompts of the same lengths and, but for the first token, of the same content."""
    draw = random.Random(seed)
    beginning = [draw.randrange(vocabulary) for _ in range(shared)]
    prompts: list[list[int]] = []
    for i in range(REQUESTS):
        own = [draw.randrange(vocabulary) for _ in range(draw.randint(8, 32))]
        prompts.append([beginning[0] if is_shared else i, *beginning[1:], *own])
    return prompts


def many(engine: Engine, prompts: list[list[int]]) -> Peer:
    """All of them, from an empty cache; the prompt tokens that went through the model."""

    def run() -> tuple[float, int]:
        engine.forget_prefixes()
        before = engine.stats.prompt_computed
        start = time.perf_counter()
        for prompt in prompts:
            engine.add(prompt, sampling(NEW_TOKENS))
        while engine.is_busy:
            engine.step()
        return time.perf_counter() - start, engine.stats.prompt_computed - before

    return run


def one(engine: Engine, prompt: list[int], *, is_hit: bool) -> Peer:
    """Up to the first token; tokens found in the cache."""

    def run() -> tuple[float, int]:
        if not is_hit:
            engine.forget_prefixes()
        start = time.perf_counter()
        request = engine.add(prompt, sampling(1))
        engine.wait(request, 0)
        return time.perf_counter() - start, request.num_cached

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what shared prefixes save.")
    parser.add_argument("model", nargs="?", default="135M", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shared", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    model = load(options.model, getattr(torch, options.dtype))
    engine = Engine.of(model, EngineSettings())
    vocabulary = model.config.vocab_size
    prompts = {
        "the same beginning": workload(vocabulary, options.shared, is_shared=True),
        "nothing in common": workload(vocabulary, options.shared, is_shared=False),
    }
    together = take_turns(
        {name: many(engine, each) for name, each in prompts.items()}, options.runs
    )
    alone = take_turns(
        {
            "miss": one(engine, prompts["the same beginning"][0][: options.shared], is_hit=False),
            "hit": one(engine, prompts["the same beginning"][0][: options.shared], is_hit=True),
        },
        3 * options.runs,
    )
    same, apart = together.values()
    computed = [runs[0].result for runs in (same, apart)]
    total = sum(map(len, prompts["nothing in common"]))
    rows = [
        [name, f"{total:,}", f"{runs[0].result:,}", f"{median(runs):,.2f}"]
        for name, runs in together.items()
    ]
    rows.append(
        ["ratio", "", f"{computed[1] / computed[0]:.1f}", f"{median(apart) / median(same):.1f}"]
    )
    first = [
        [name, f"{options.shared:,}", f"{runs[0].result:,}", f"{1000 * median(runs):,.1f}"]
        for name, runs in alone.items()
    ]
    hit = median(alone["hit"]) / median(alone["miss"])
    name = Path(options.model).name
    is_deterministic = "" if engine.deterministic else "not "
    report = (
        f"{name}, {options.dtype}, engine {is_deterministic}deterministic: {REQUESTS} requests, "
        f"{options.shared:,} tokens shared, 8-32 of their own, {NEW_TOKENS} generated.\n\n"
        f"{table(['', 'prompt tokens', 'of these computed', 'seconds'], rows)}\n\n"
        f"One request up to its first token:\n\n"
        f"{table(['', 'prompt tokens', 'of these cached', 'ms'], first)}\n\n"
        f"A hit takes {hit:.1%} of a miss. {disturbance(together | alone)}."
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
            "runs": timings(together | alone),
        }
        keep(f"prefix_{name}_{options.dtype}", report, circumstances(command), data)


if __name__ == "__main__":
    main()
