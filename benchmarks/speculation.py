"""Speculative decoding: acceptance of draft tokens, and speed with and without drafts.

python benchmarks/speculation.py [--new 300] [--runs 3] [--save]

Three tasks on `tiny` in fp32, with a single request and with eight at once:

- repetition: a sentence repeated six times, which the model continues greedily. The best case for
  prompt lookup, like a text that quotes or corrects another text;
- stories, greedily: eight beginnings of stories; after the end of a story another story begins;
- stories, drawn: the same beginnings with the checkpoint's default sampling.

Compared are: no drafts; prompt lookup; the first half of the model's layers as draft model; and the
whole model in bf16 as draft model, with almost full acceptance but as slow as the target. No real
pair of models was available, so the two draft models only show the cost of drafting and
verification: neither is both cheap and accurate, as 1B is for 3B. All outputs must be equal.
measuring.py explains turns and rejected runs.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from measuring import RESULTS, bf16_note, provenance, save_result, table, timings

import llama32
from llama32.bench.interleave import (
    Run,
    TimedCall,
    disturbance,
    interleave_in_process,
    median_seconds,
)
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings, Speculation
from llama32.model import Llama
from llama32.sampling_params import Sampling

BEGINNINGS = (
    "Once upon a time",
    "One day, a dog",
    "Tom and Lily",
    "There was a big tree",
    "In the park",
    "A little girl",
    "The sun was hot",
    "Max had a red ball",
)
SENTENCES = (
    "They climbed the tree.",
    "The dog ran to the park.",
    "Lily was happy to see her mom.",
    "The ball was red and big.",
    "He said he was sorry.",
    "The cat sat on the mat.",
    "They played with the toys all day.",
    "The bird sang a song.",
)
NONE = "none"


class Outcome(NamedTuple):
    """Outputs and draft counts of a run."""

    outputs: list[list[int]]
    drafted: int
    accepted: int


class Task(NamedTuple):
    """A workload: prompts and sampling."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling


def tasks(llm: llama32.LLM, new: int) -> dict[str, Task]:
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def prompts(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text, bos=True) for text in texts]

    greedy = Sampling(temperature=0, ignore_eos=True, max_new_tokens=new)
    drawn = dataclasses.replace(llm.defaults, ignore_eos=True, max_new_tokens=new)
    repeated = [" ".join([sentence] * 6) for sentence in SENTENCES]
    return {
        "repetition": Task(prompts(repeated), greedy),
        "stories, greedily": Task(prompts(BEGINNINGS), greedy),
        "stories, drawn": Task(prompts(BEGINNINGS), drawn),
    }


def first_half(model: Llama) -> Llama:
    """Return a model with the first half of the layers."""
    layers = model.config.num_hidden_layers // 2
    half = Llama(dataclasses.replace(model.config, num_hidden_layers=layers))
    weights = model.state_dict()
    half.load_state_dict({name: weights[name] for name in half.state_dict()})
    return half.to(model.norm.weight.dtype)


def task_call(model: Llama, speculation: Speculation | None, task: Task, count: int) -> TimedCall:
    """Return a call of the first `count` requests of a task, all at once."""
    engine = Engine.of(model, EngineSettings(speculation=speculation, deterministic=True))

    def run() -> tuple[float, Outcome]:
        engine.forget_prefixes()
        before = engine.stats
        start = time.perf_counter()
        requests = [
            engine.add(prompt, dataclasses.replace(task.sampling, seed=seed))
            for seed, prompt in enumerate(task.prompts[:count])
        ]
        while engine.is_busy:
            engine.step()
        seconds, after = time.perf_counter() - start, engine.stats
        return seconds, Outcome(
            [request.output for request in requests],
            after.drafted - before.drafted,
            after.accepted - before.accepted,
        )

    return run


def result_row(case: str, name: str, runs: Sequence[Run], baseline: Sequence[Run]) -> list[str]:
    outcome: Outcome = runs[0].result
    tokens = sum(map(len, outcome.outputs))
    rate, plain = tokens / median_seconds(runs), tokens / median_seconds(baseline)
    if outcome.outputs != baseline[0].result.outputs:
        raise RuntimeError(f"{case}: drafts ({name}) changed the outputs")
    accepted = f"{outcome.accepted / outcome.drafted:.0%}" if outcome.drafted else ""
    # Per request; a batch runs until the last request ends.
    tokens_per_step = tokens / (tokens - outcome.accepted)
    return [case, name, accepted, f"{tokens_per_step:.2f}", f"{rate:,.0f}", f"{rate / plain:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speculative decoding.")
    parser.add_argument("--new", type=int, default=300, help="tokens per request")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    llm = llama32.load("tiny", device="cpu", dtype=torch.float32)
    drafts: dict[str, Speculation | None] = {
        NONE: None,
        "prompt lookup": llama32.PromptLookup(),
        "half of its layers": llama32.DraftModel(first_half(llm.model)),
        "itself in bf16": llama32.DraftModel(
            llama32.load_model("tiny", dtype=torch.bfloat16), num_tokens=4
        ),
    }
    rows: list[list[str]] = []
    results: dict[str, list[Run]] = {}
    for task_name, task in tasks(llm, options.new).items():
        for count in (1, len(task.prompts)):
            case = f"{task_name}, {count}"
            calls = {
                name: task_call(llm.model, speculation, task, count)
                for name, speculation in drafts.items()
            }
            runs_by_drafts = interleave_in_process(calls, options.runs)
            baseline = runs_by_drafts[NONE]
            rows += [
                result_row(case, name, runs, baseline) for name, runs in runs_by_drafts.items()
            ]
            results |= {f"{case}: {name}": runs for name, runs in runs_by_drafts.items()}
    head = ["task, requests", "drafts", "accepted", "tokens a step", "tokens/s", "relative to none"]
    report = (
        f"tiny, fp32, deterministic: {options.new} tokens per request; medians of "
        f"{options.runs} runs. All outputs are equal.\n\n{table(head, rows)}\n\n"
        f"{disturbance(results)}. {bf16_note()}"
    ).rstrip()
    print(report)
    if options.save:
        command = f"benchmarks/speculation.py --new {options.new} --runs {options.runs} --save"
        counts = {name: runs[0].result[1:] for name, runs in results.items()}
        data = {"drafted, accepted": counts, "runs": timings(results)}
        save_result("speculation", report, provenance(command), data)


if __name__ == "__main__":
    main()
