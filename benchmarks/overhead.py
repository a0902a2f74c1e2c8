"""What the engine itself takes of a step: planning, keeping books, building the batch's tensors.

python benchmarks/overhead.py [--steps 200] [--runs 5] [--save]

The model is one that answers at once with logits made beforehand, so that nothing of the model's
time is in a step. Of what is left, drawing the tokens is told apart: it grows with the vocabulary
(here 128,256, greedily), the rest does not. All that run are decoding, with contexts of about
1,000 tokens. How turns are taken and disturbed runs rejected: see measuring.py.
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import RESULTS, circumstances, keep, table, timings
from throughput import load, sampling
from torch import Tensor

from llama32.bench.turns import Peer, Run, disturbance, take_turns
from llama32.engine import runner
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.model import Llama

VOCABULARY = 128256
CONTEXT = 1000
CASES = ((1, 0), (8, 0), (64, 0), (64, 1_000), (64, 100_000))  # running, waiting


class Instant(Llama):
    """A model without arithmetic."""

    answers: Tensor

    def forward(
        self, tokens: Tensor, positions: Tensor, attends: Sequence[Any], **_: Any
    ) -> Tensor:
        _ = attends[0].batch.reads  # what attention needs, found out in the first layer
        return self.answers[: len(tokens)]


def instant() -> Llama:
    tiny = load("tiny", torch.float32).config
    config = dataclasses.replace(tiny, vocab_size=VOCABULARY, max_position_embeddings=1 << 20)
    model = Instant(config)
    model.answers = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return model


class Clock:
    """Seconds spent inside a function."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - start


def steps(model: Llama, running: int, waiting: int, count: int, drawing: Clock) -> Peer:
    """`count` steps of decoding; the median of each, without drawing and of drawing."""

    def run() -> tuple[float, tuple[float, float]]:
        longest = CONTEXT + count + 300  # the first are at it while others' prompts are read
        settings = EngineSettings(
            max_running=running, deterministic=False, cache_tokens=running * (longest + 64)
        )
        engine = Engine.of(model, settings)
        draw = random.Random(0)
        for _ in range(running):
            engine.add(
                [draw.randrange(VOCABULARY) for _ in range(CONTEXT)], sampling(longest - CONTEXT)
            )
        while engine.stats.generated < running:
            engine.step()
        for _ in range(waiting):
            engine.add([1], sampling(1))
        wholes, draws = [], []
        for _ in range(count):
            before, start = drawing.seconds, time.perf_counter()
            engine.step()
            wholes.append(time.perf_counter() - start)
            draws.append(drawing.seconds - before)
        of_engine = [whole - its for whole, its in zip(wholes, draws, strict=True)]
        return sum(wholes), (statistics.median(of_engine), statistics.median(draws))

    return run


def milliseconds(runs: Sequence[Run], part: int) -> float:
    return 1000 * statistics.median(run.result[part] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the engine takes of a step.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    drawing = Clock(runner.draw)
    runner.draw = drawing
    model = instant()
    peers = {case: steps(model, *case, options.steps, drawing) for case in CASES}
    found = take_turns({f"{r} running, {w:,} waiting": peers[r, w] for r, w in peers}, options.runs)
    rows = [
        [
            f"{running}",
            f"{waiting:,}",
            f"{milliseconds(runs, 0):.3f}",
            f"{milliseconds(runs, 1):.2f}",
        ]
        for (running, waiting), runs in zip(CASES, found.values(), strict=True)
    ]
    head = ["running", "waiting", "engine, ms a step", "drawing, ms a step"]
    report = (
        f"Contexts of {CONTEXT:,} tokens, vocabulary {VOCABULARY:,}; medians of {options.steps} "
        f"steps, then of {options.runs} runs.\n\n{table(head, rows)}\n\n{disturbance(found)}."
    )
    print(report)
    if options.save:
        command = f"benchmarks/overhead.py --steps {options.steps} --runs {options.runs} --save"
        kept = {name: [run.result for run in runs] for name, runs in found.items()}
        data = {"seconds, of the engine and of drawing": kept, "runs": timings(found)}
        keep("overhead", report, circumstances(command), data)


if __name__ == "__main__":
    main()
