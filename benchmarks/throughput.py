"""Throughput: generated tokens per second of many requests, compared with transformers.

python benchmarks/throughput.py [model] [--dtype float32] [--device cpu] [--requests 64] [--save]

`model` is a folder, `tiny` (part of the package) or a shape of make_random.py. All requests arrive
at the start: random prompts of 20-200 ids, each for exactly 20-200 greedy tokens. measuring.py
explains turns and rejected runs.

Compared on the same weights in the same dtype:

- the engine, once not deterministic (fastest), once deterministic (batch-invariant); the prefix
  cache is emptied before each run;
- a loop of single `generate` calls over the first requests only (--loop), because the loop is slow;
- transformers `generate` over left-padded batches with SDPA, where each batch runs until the
  longest output; only requested tokens count. Measured are all requests in a single batch, and the
  fastest of: a single batch, batches of 16 in order, batches of 16 sorted by requested tokens;
- transformers continuous batching with SDPA, with the number of tokens per request; the prefix
  cache is off and the start is not timed. Measured is the faster of 16 and 64 requests at once,
  with at most 1,024 tokens a step.

Each variant of transformers is tried once, and the result contains the time of the trial.
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
from measuring import RESULTS, bf16_note, provenance, save_result, table, timings
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.logging import disable_progress_bar

import llama32
from llama32.bench.interleave import (
    Run,
    TimedCall,
    disturbance,
    interleave_in_process,
    median_seconds,
    run_once,
    run_undisturbed,
)
from llama32.checkpoint.writer import save
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.generate import generate
from llama32.model import Llama
from llama32.sampling_params import Sampling


class WorkItem(NamedTuple):
    """A request of the workload."""

    prompt: list[int]
    count: int  # tokens to generate


Outputs = list[list[int]]

ENGINE, DETERMINISTIC, LOOP = "engine", "engine, deterministic", "loop of `generate`"
PAGE = 64  # tokens per page of the cache of transformers, as in llama32


def workload(vocabulary: int, count: int, seed: int = 0) -> list[WorkItem]:
    rng = random.Random(seed)

    def item() -> WorkItem:
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(20, 200))]
        return WorkItem(prompt, rng.randint(20, 200))

    return [item() for _ in range(count)]


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> Llama:
    if name in SHAPES:
        return random_model(SHAPES[name], 0).to(device, dtype)
    return llama32.load_model(name, dtype=dtype, device=device)


def greedy_sampling(count: int) -> Sampling:
    return Sampling(temperature=0, ignore_eos=True, max_new_tokens=count)


def engine_call(model: Llama, requests: Sequence[WorkItem], *, deterministic: bool) -> TimedCall:
    settings = EngineSettings(deterministic=deterministic, max_running=64)
    engine = Engine.of(model, settings)

    def run() -> tuple[float, Outputs]:
        engine.forget_prefixes()
        start = time.perf_counter()
        added = [engine.add(prompt, greedy_sampling(count)) for prompt, count in requests]
        while engine.is_busy:
            engine.step()
        return time.perf_counter() - start, [request.output for request in added]

    return run


def loop_call(model: Llama, requests: Sequence[WorkItem]) -> TimedCall:
    def run() -> tuple[float, Outputs]:
        start = time.perf_counter()
        outputs = [
            [token.id for token in generate(model, prompt, greedy_sampling(count))]
            for prompt, count in requests
        ]
        return time.perf_counter() - start, outputs

    return run


def padded_call(
    model: Any, requests: Sequence[WorkItem], *, size: int, is_sorted: bool
) -> TimedCall:
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
            padding = [width - len(requests[i].prompt) for i in rows]
            ids = [[0] * n + requests[i].prompt for n, i in zip(padding, rows, strict=True)]
            mask = [[0] * n + [1] * (width - n) for n in padding]
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(requests[i].count for i in rows),
                do_sample=False,
            )
            for i, row in zip(rows, output[:, width:].tolist(), strict=True):
                outputs[i] = row[: requests[i].count]
        return time.perf_counter() - start, outputs

    return run


def continuous_call(model: Any, requests: Sequence[WorkItem], *, size: int) -> TimedCall:
    max_length = max(len(prompt) + count for prompt, count in requests)
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=len(requests) * -(-max_length // PAGE),
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


def transformers_model(model: Llama) -> Any:
    """Return the same weights as a transformers model, on the same device."""
    weight = model.norm.weight
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        peer: Any = LlamaForCausalLM.from_pretrained(
            folder, dtype=weight.dtype, attn_implementation="sdpa"
        )
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.to(weight.device)


def compare(
    model: Llama, requests: Sequence[WorkItem], loop: int, runs: int
) -> tuple[dict[str, list[Run]], dict[str, Run], list[str]]:
    """Return the interleaved runs, the trial runs of transformers, and its selected variants."""
    calls = {
        ENGINE: engine_call(model, requests, deterministic=False),
        DETERMINISTIC: engine_call(model, requests, deterministic=True),
        LOOP: loop_call(model, requests[:loop]),
    }
    padded_model, continuous_model = transformers_model(model), transformers_model(model)
    whole = f"padded, {len(requests)} at once"
    padded = {whole: padded_call(padded_model, requests, size=len(requests), is_sorted=False)}
    for is_sorted in (False, True):
        name = f"padded, 16 at once{', sorted' if is_sorted else ''}"
        padded[name] = padded_call(padded_model, requests, size=16, is_sorted=is_sorted)
    continuous = {
        f"continuous, {n} at once": continuous_call(continuous_model, requests, size=n)
        for n in (16, 64)
    }
    loop_call(model, [WorkItem(requests[0].prompt, 8)])()
    for call in (calls[ENGINE], calls[DETERMINISTIC]):
        call()
    padded_call(padded_model, [WorkItem(requests[0].prompt, 8)], size=1, is_sorted=False)()
    continuous_call(continuous_model, [WorkItem(requests[0].prompt, 8)], size=1)()
    variants = padded | continuous
    trials = {name: run_undisturbed(partial(run_once, call)) for name, call in variants.items()}
    best = [min(names, key=lambda name: trials[name].seconds) for names in (padded, continuous)]
    selected = list(dict.fromkeys([whole, *best]))
    calls |= {name: variants[name] for name in selected}
    return interleave_in_process(calls, runs, warm=False), trials, selected


def rates(
    results: Mapping[str, Sequence[Run]], requests: Sequence[WorkItem], loop: int
) -> dict[str, float]:
    """Return the generated tokens per second of each call, by the median of the runs."""

    def tokens(name: str) -> int:
        return sum(item.count for item in (requests[:loop] if name == LOOP else requests))

    return {name: tokens(name) / median_seconds(runs) for name, runs in results.items()}


def equal_outputs(results: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """Count the requests of each call with the output of the loop, or of the engine.

    The engine's outputs are the reference for requests that the loop left out.
    """
    loop_outputs = results[LOOP][0].result
    expected = [*loop_outputs, *results[ENGINE][0].result[len(loop_outputs) :]]
    counts: dict[str, str] = {}
    for name, runs in results.items():
        outputs = runs[0].result
        same = sum(a == b for a, b in zip(outputs, expected, strict=False))
        counts[name] = f"{same} of {len(outputs)}"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure throughput, compared with transformers.")
    parser.add_argument("model", nargs="?", default="tiny", help=f"or a folder, or {[*SHAPES]}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--loop", type=int, default=16, help="requests of the loop")
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    disable_progress_bar()
    model = load(options.model, getattr(torch, options.dtype), options.device)
    requests = workload(model.config.vocab_size, options.requests)
    results, trials, selected = compare(model, requests, options.loop, options.runs)

    rate, equal = rates(results, requests, options.loop), equal_outputs(results)
    rows = [
        [
            f"transformers, {name}" if name in selected else name,
            f"{rate[name]:,.0f}",
            *(f"{rate[name] / rate[other]:.2f}" for other in (LOOP, *selected)),
            equal[name],
        ]
        for name in results
    ]
    head = ["", "tokens/s", "× loop", *(f"× {name}" for name in selected), "equal outputs"]
    total = sum(item.count for item in requests)
    trial_times = "; ".join(f"{name} {run.seconds:.1f} s" for name, run in trials.items())
    name = Path(options.model).name
    report = (
        f"{name}, {options.dtype}: {len(requests)} requests, {total:,} tokens to generate, the "
        f"loop the first {options.loop}.\n\n{table(head, rows)}\n\n"
        f"Determinism costs {1 - rate[DETERMINISTIC] / rate[ENGINE]:.0%}. Outputs are compared "
        f"with the loop, then with the engine: a different order of sums can flip a near tie. "
        f"Trials of transformers: {trial_times}. {disturbance(results)}."
    )
    if (options.device, options.dtype) == ("cpu", "bfloat16"):
        report = f"{report} {bf16_note()}".rstrip()
    print(report)
    if options.save:
        command = (
            f"benchmarks/throughput.py {name} --dtype {options.dtype} --device {options.device} "
            f"--runs {options.runs} --requests {options.requests} --loop {options.loop} --save"
        )
        source = provenance(command, ("torch", "transformers"), options.device)
        data = {
            "tokens_per_second": {key: round(value, 2) for key, value in rate.items()},
            "equal_outputs": equal,
            "tried": timings({key: [run] for key, run in trials.items()}),
            "runs": timings(results),
        }
        count = "" if options.requests == 64 else f"_{options.requests}"
        save_result(f"throughput_{name}_{options.dtype}{count}", report, source, data)


if __name__ == "__main__":
    main()
