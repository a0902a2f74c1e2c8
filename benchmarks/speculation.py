"""What drafts save: how many are right, and the speed with them beside that without.

python benchmarks/speculation.py [--new 300] [--runs 3] [--save]

On `tiny`, in fp32, one request and eight at once, three tasks:

- repetition: a sentence six times over, which the model goes on with, greedily. The best case there
  is for prompt lookup, as a text is that quotes or corrects another;
- stories, greedily: eight beginnings of stories; where one ends, another begins;
- stories, drawn: the same with the checkpoint's own settings.

The peers: no drafts; prompt lookup; the first half of the model's own layers as a draft model; and
the whole model in bf16, which is nearly always right and takes as long as the model itself. No real
pair of models can be had here, so the latter two only show that drafts come and are verified at
what cost: neither is cheap and good, as 1B is for 3B. Outputs must be the same with all of them.
How turns are taken and disturbed runs rejected: see measuring.py.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from measuring import RESULTS, bf16_note, circumstances, keep, table, timings

import llama32
from llama32.bench.turns import Peer, Run, disturbance, median, take_turns
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings, Speculation
from llama32.model import Llama
from llama32.settings import Sampling

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
    """What one run gave."""

    outputs: list[list[int]]
    drafted: int
    accepted: int


class Task(NamedTuple):
    """What all peers are asked to do."""

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
    """The same without the other layers."""
    layers = model.config.num_hidden_layers // 2
    half = Llama(dataclasses.replace(model.config, num_hidden_layers=layers))
    weights = model.state_dict()
    half.load_state_dict({name: weights[name] for name in half.state_dict()})
    return half.to(model.norm.weight.dtype)


def by(model: Llama, speculation: Speculation | None, task: Task, count: int) -> Peer:
    """The first `count` requests of a task, all at once."""
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


def row(case: str, name: str, runs: Sequence[Run], without: Sequence[Run]) -> list[str]:
    found: Outcome = runs[0].result
    tokens = sum(map(len, found.outputs))
    rate, plain = tokens / median(runs), tokens / median(without)
    if found.outputs != without[0].result.outputs:
        raise RuntimeError(f"{case}: with drafts of {name} the outputs are others")
    accepted = f"{found.accepted / found.drafted:.0%}" if found.drafted else ""
    # Of one request; several wait for the last of them.
    in_a_step = tokens / (tokens - found.accepted)
    return [case, name, accepted, f"{in_a_step:.2f}", f"{rate:,.0f}", f"{rate / plain:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what speculative decoding saves.")
    parser.add_argument("--new", type=int, default=300, help="tokens of each request")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
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
    found: dict[str, list[Run]] = {}
    for task_name, task in tasks(llm, options.new).items():
        for count in (1, len(task.prompts)):
            case = f"{task_name}, {count}"
            peers = {name: by(llm.model, each, task, count) for name, each in drafts.items()}
            turns = take_turns(peers, options.runs)
            rows += [row(case, name, runs, turns[NONE]) for name, runs in turns.items()]
            found |= {f"{case}: {name}": runs for name, runs in turns.items()}
    head = ["task, requests", "drafts", "right", "tokens a step", "tokens/s", "to none"]
    report = (
        f"tiny, fp32, deterministic: {options.new} tokens to each request; medians of "
        f"{options.runs} runs. Outputs are the same in all.\n\n{table(head, rows)}\n\n"
        f"{disturbance(found)}. {bf16_note()}"
    ).rstrip()
    print(report)
    if options.save:
        command = f"benchmarks/speculation.py --new {options.new} --runs {options.runs} --save"
        counts = {name: runs[0].result[1:] for name, runs in found.items()}
        data = {"drafted, right": counts, "runs": timings(found)}
        keep("speculation", report, circumstances(command), data)


if __name__ == "__main__":
    main()
