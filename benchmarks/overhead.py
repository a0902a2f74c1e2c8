"""Engine overhead per step: scheduling, bookkeeping, and building the batch tensors.

python benchmarks/overhead.py [--steps 200] [--runs 5] [--save]

The model returns prepared logits at once, so a step contains no model time. Sampling is reported
separately, because only its time grows with the vocabulary (here 128,256 tokens, greedy). All
running requests decode, with contexts of about 1,000 tokens. measuring.py explains turns and
rejected runs.
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import RESULTS, provenance, save_result, table, timings
from throughput import greedy_sampling, load
from torch import Tensor

from llama32.bench.interleave import Run, TimedCall, disturbance, interleave_in_process
from llama32.engine import runner
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.model import Llama

VOCABULARY = 128256
CONTEXT = 1000
CASES = ((1, 0), (8, 0), (64, 0), (64, 1_000), (64, 100_000))  # running, waiting


class InstantModel(Llama):
    """A model without arithmetic."""

    logits: Tensor

    def forward(
        self, tokens: Tensor, positions: Tensor, attention_fns: Sequence[Any], **_: Any
    ) -> Tensor:
        _ = attention_fns[0].batch.kv_locations  # computed in the first layer, and part of the cost
        return self.logits[: len(tokens)]


def instant_model() -> Llama:
    tiny = load("tiny", torch.float32).config
    config = dataclasses.replace(tiny, vocab_size=VOCABULARY, max_position_embeddings=1 << 20)
    model = InstantModel(config)
    model.logits = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return model


class CallTimer:
    """A wrapper that adds up the seconds spent in a function."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - start


def decode_call(
    model: Llama, running: int, waiting: int, count: int, sampling: CallTimer
) -> TimedCall:
    """Return a call of `count` decode steps, with medians of engine and sampling time."""

    def run() -> tuple[float, tuple[float, float]]:
        # Requests that start early decode while the prompts of later requests are read.
        max_length = CONTEXT + count + 300
        settings = EngineSettings(
            max_running=running, deterministic=False, cache_tokens=running * (max_length + 64)
        )
        engine = Engine.of(model, settings)
        rng = random.Random(0)
        for _ in range(running):
            engine.add(
                [rng.randrange(VOCABULARY) for _ in range(CONTEXT)],
                greedy_sampling(max_length - CONTEXT),
            )
        while engine.stats.generated < running:
            engine.step()
        for _ in range(waiting):
            engine.add([1], greedy_sampling(1))
        step_seconds, sampling_seconds = [], []
        for _ in range(count):
            before, start = sampling.seconds, time.perf_counter()
            engine.step()
            step_seconds.append(time.perf_counter() - start)
            sampling_seconds.append(sampling.seconds - before)
        engine_seconds = [
            step - sampled for step, sampled in zip(step_seconds, sampling_seconds, strict=True)
        ]
        medians = statistics.median(engine_seconds), statistics.median(sampling_seconds)
        return sum(step_seconds), medians

    return run


def milliseconds(runs: Sequence[Run], part: int) -> float:
    return 1000 * statistics.median(run.result[part] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the engine's overhead per step.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    sampling = CallTimer(runner.sample_next_tokens)
    runner.sample_next_tokens = sampling
    model = instant_model()
    calls = {case: decode_call(model, *case, options.steps, sampling) for case in CASES}
    results = interleave_in_process(
        {f"{r} running, {w:,} waiting": calls[r, w] for r, w in calls}, options.runs
    )
    rows = [
        [
            f"{running}",
            f"{waiting:,}",
            f"{milliseconds(runs, 0):.3f}",
            f"{milliseconds(runs, 1):.2f}",
        ]
        for (running, waiting), runs in zip(CASES, results.values(), strict=True)
    ]
    head = ["running", "waiting", "engine, ms a step", "sampling, ms a step"]
    report = (
        f"Contexts of {CONTEXT:,} tokens, vocabulary {VOCABULARY:,}; medians of {options.steps} "
        f"steps, then of {options.runs} runs.\n\n{table(head, rows)}\n\n{disturbance(results)}."
    )
    print(report)
    if options.save:
        command = f"benchmarks/overhead.py --steps {options.steps} --runs {options.runs} --save"
        medians = {name: [run.result for run in runs] for name, runs in results.items()}
        data = {"seconds, of the engine and of sampling": medians, "runs": timings(results)}
        save_result("overhead", report, provenance(command), data)


if __name__ == "__main__":
    main()
