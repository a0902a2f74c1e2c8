"""Generated tokens per second of many requests, beside transformers.

python benchmarks/throughput.py [model] [--dtype float32] [--device cpu] [--requests 64] [--save]

`model` is a folder, `tiny` (which comes with the package) or a shape of make_random.py. All
requests are there from the start: random prompts of 20-200 ids, each asking for exactly 20-200
tokens, greedily. How turns are taken and disturbed runs rejected: see measuring.py.

The peers, on the same weights in the same dtype:

- the engine, once as fast as it can, once deterministic (the same bits in any company); what it
  remembers of prompts is dropped before each run;
- a loop of single `generate` calls, over the first requests only (--loop), as it takes so long;
- transformers `generate` over left-padded batches with SDPA, each batch running until its longest
  output; only the tokens that were asked for count. All requests in one batch, and whichever is
  fastest of that and of batches of 16, as they come or sorted by what they ask for;
- transformers continuous batching with SDPA, which takes the number of tokens of each request; its
  prefix cache is off and its start not counted. Whichever is faster of 16 and 64 at once, 1,024
  tokens a step at most.

Each of the variants of transformers is tried once, and what that took is in the result.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from make_random import SHAPES, random_model
from measuring import RESULTS, bf16_note, circumstances, keep, table, timings
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.logging import disable_progress_bar

import llama32
from llama32.bench.turns import (
    Peer,
    Run,
    disturbance,
    median,
    run_once,
    run_undisturbed,
    take_turns,
)
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.generate import generate
from llama32.model import Llama
from llama32.saving import save
from llama32.settings import Sampling


class Asked(NamedTuple):
    """One request of the workload."""

    prompt: list[int]
    count: int  # tokens to generate


Outputs = list[list[int]]

ENGINE, DETERMINISTIC, LOOP = "engine", "engine, deterministic", "loop of `generate`"
PAGE = 64  # of transformers' cache, as of ours


def workload(vocabulary: int, count: int, seed: int = 0) -> list[Asked]:
    draw = random.Random(seed)

    def one() -> Asked:
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(20, 200))]
        return Asked(prompt, draw.randint(20, 200))

    return [one() for _ in range(count)]


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> Llama:
    if name in SHAPES:
        return random_model(SHAPES[name], 0).to(device, dtype)
    return llama32.load_model(name, dtype=dtype, device=device)


def sampling(count: int) -> Sampling:
    return Sampling(temperature=0, ignore_eos=True, max_new_tokens=count)


def by_engine(model: Llama, requests: Sequence[Asked], *, deterministic: bool) -> Peer:
    settings = EngineSettings(deterministic=deterministic, max_running=64)
    engine = Engine.of(model, settings)

    def run() -> tuple[float, Outputs]:
        engine.forget_prefixes()
        start = time.perf_counter()
        added = [engine.add(prompt, sampling(count)) for prompt, count in requests]
        while engine.is_busy:
            engine.step()
        return time.perf_counter() - start, [request.output for request in added]

    return run


def by_loop(model: Llama, requests: Sequence[Asked]) -> Peer:
    def run() -> tuple[float, Outputs]:
        start = time.perf_counter()
        outputs = [
            [token.id for token in generate(model, prompt, sampling(count))]
            for prompt, count in requests
        ]
        return time.perf_counter() - start, outputs

    return run


def by_padding(model: Any, requests: Sequence[Asked], *, size: int, is_sorted: bool) -> Peer:
    order = list(range(len(requests)))
    if is_sorted:
        order.sort(key=lambda i: requests[i].count)

    @torch.inference_mode()
    def run() -> tuple[float, Outputs]:
        outputs: Outputs = [[] for _ in requests]
        start = time.perf_counter()
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            width = max(len(requests[i].prompt) for i in rows)
            blank = [width - len(requests[i].prompt) for i in rows]
            ids = [[0] * n + requests[i].prompt for n, i in zip(blank, rows, strict=True)]
            mask = [[0] * n + [1] * (width - n) for n in blank]
            made = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(requests[i].count for i in rows),
                do_sample=False,
            )
            for i, row in zip(rows, made[:, width:].tolist(), strict=True):
                outputs[i] = row[: requests[i].count]
        return time.perf_counter() - start, outputs

    return run


def by_continuous(model: Any, requests: Sequence[Asked], *, size: int) -> Peer:
    longest = max(len(prompt) + count for prompt, count in requests)
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=len(requests) * -(-longest // PAGE),
        max_batch_tokens=1024,
        max_requests_per_batch=size,
        allow_block_sharing=False,
    )
    config = GenerationConfig(do_sample=False, eos_token_id=-1)

    def run() -> tuple[float, Outputs]:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings
        ) as manager:
            start = time.perf_counter()
            ids = [manager.add_request(prompt, max_new_tokens=n) for prompt, n in requests]
            done: dict[str, list[int]] = {}
            while len(done) < len(ids):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is not None:
                    raise RuntimeError(f"transformers continuous batching: {result.error}")
                if result is not None and result.is_finished():
                    done[result.request_id] = result.generated_tokens
                elif not manager.is_running():
                    raise RuntimeError("transformers continuous batching has stopped by itself")
            seconds = time.perf_counter() - start
        return seconds, [done[i] for i in ids if i is not None]

    return run


def theirs(model: Llama) -> Any:
    """The same weights in transformers, and where they are."""
    weight = model.norm.weight
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        its: Any = LlamaForCausalLM.from_pretrained(
            folder, dtype=weight.dtype, attn_implementation="sdpa"
        )
    its.generation_config.eos_token_id = None
    its.generation_config.pad_token_id = 0
    return its.to(weight.device)


def compare(
    model: Llama, requests: Sequence[Asked], loop: int, runs: int
) -> tuple[dict[str, list[Run]], dict[str, Run], list[str]]:
    """All turns; what the variants of transformers took when they were tried; and the names of
    its padding peers and its continuous one."""
    ours = {
        ENGINE: by_engine(model, requests, deterministic=False),
        DETERMINISTIC: by_engine(model, requests, deterministic=True),
        LOOP: by_loop(model, requests[:loop]),
    }
    padding, continuous = theirs(model), theirs(model)
    everyone = len(requests)
    whole = f"padded, {everyone} at once"
    padded = {whole: by_padding(padding, requests, size=everyone, is_sorted=False)}
    for is_sorted in (False, True):
        name = f"padded, 16 at once{', sorted' if is_sorted else ''}"
        padded[name] = by_padding(padding, requests, size=16, is_sorted=is_sorted)
    packed = {
        f"continuous, {n} at once": by_continuous(continuous, requests, size=n) for n in (16, 64)
    }
    by_loop(model, [Asked(requests[0].prompt, 8)])()
    for peer in (ours[ENGINE], ours[DETERMINISTIC]):
        peer()
    by_padding(padding, [Asked(requests[0].prompt, 8)], size=1, is_sorted=False)()
    by_continuous(continuous, [Asked(requests[0].prompt, 8)], size=1)()
    tried = {
        name: run_undisturbed(partial(run_once, peer)) for name, peer in (padded | packed).items()
    }
    best = [min(names, key=lambda name: tried[name].seconds) for names in (padded, packed)]
    chosen = dict.fromkeys([whole, *best])
    peers = ours | {name: (padded | packed)[name] for name in chosen}
    return take_turns(peers, runs, warm=False), tried, list(chosen)


def rates(
    found: Mapping[str, Sequence[Run]], requests: Sequence[Asked], loop: int
) -> dict[str, float]:
    """Generated tokens per second, by the median of the runs."""

    def tokens(name: str) -> int:
        return sum(one.count for one in (requests[:loop] if name == LOOP else requests))

    return {name: tokens(name) / median(runs) for name, runs in found.items()}


def equal_outputs(found: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """How many of each peer's requests got what the loop, or where it did not come, the engine
    gave."""
    expected = [*found[LOOP][0].result, *found[ENGINE][0].result[len(found[LOOP][0].result) :]]
    counts: dict[str, str] = {}
    for name, runs in found.items():
        outputs = runs[0].result
        same = sum(a == b for a, b in zip(outputs, expected, strict=False))
        counts[name] = f"{same} of {len(outputs)}"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure throughput beside transformers.")
    parser.add_argument("model", nargs="?", default="tiny", help=f"or a folder, or {[*SHAPES]}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--loop", type=int, default=16, help="requests that the loop does")
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    disable_progress_bar()
    model = load(options.model, getattr(torch, options.dtype), options.device)
    requests = workload(model.config.vocab_size, options.requests)
    found, tried, peers = compare(model, requests, options.loop, options.runs)

    rate, equal = rates(found, requests, options.loop), equal_outputs(found)
    rows = [
        [
            f"transformers, {name}" if name in peers else name,
            f"{rate[name]:,.0f}",
            *(f"{rate[name] / rate[other]:.2f}" for other in (LOOP, *peers)),
            equal[name],
        ]
        for name in found
    ]
    head = ["", "tokens/s", "× loop", *(f"× {name}" for name in peers), "equal outputs"]
    total = sum(one.count for one in requests)
    tries = "; ".join(f"{name} {run.seconds:.1f} s" for name, run in tried.items())
    name = Path(options.model).name
    report = (
        f"{name}, {options.dtype}: {len(requests)} requests, {total:,} tokens to generate, the "
        f"loop its first {options.loop}.\n\n{table(head, rows)}\n\n"
        f"Determinism costs {1 - rate[DETERMINISTIC] / rate[ENGINE]:.0%}. Equal outputs are those "
        f"of the loop, then of the engine: a near tie may go another way when sums take another "
        f"order. transformers tried once: {tries}. {disturbance(found)}."
    )
    if (options.device, options.dtype) == ("cpu", "bfloat16"):
        report = f"{report} {bf16_note()}".rstrip()
    print(report)
    if options.save:
        command = (
            f"benchmarks/throughput.py {name} --dtype {options.dtype} --device {options.device} "
            f"--runs {options.runs} --requests {options.requests} --loop {options.loop} --save"
        )
        kept = circumstances(command, ("torch", "transformers"), options.device)
        data = {
            "tokens_per_second": {each: round(value, 2) for each, value in rate.items()},
            "equal_outputs": equal,
            "tried": timings({each: [run] for each, run in tried.items()}),
            "runs": timings(found),
        }
        count = "" if options.requests == 64 else f"_{options.requests}"
        keep(f"throughput_{name}_{options.dtype}{count}", report, kept, data)


if __name__ == "__main__":
    main()
