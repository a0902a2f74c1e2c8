"""Where the time of a decode step goes: the products with weights, attention, and all the rest.

python benchmarks/profiling.py FOLDER [--forms optimized int8] [--batches 1 8] [--save]

Wall time around each kind of call, the median over steps; what is inside another is counted there
alone. Taking the time costs a few microseconds for each of some hundred calls.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import RESULTS, circumstances, keep, table

from llama32 import model as modules
from llama32.adapt.packed import PackedLinear
from llama32.adapt.packed_int import RowInt8Linear
from llama32.bench.contenders import STEADY, Ours
from llama32.bench.plan import Plan
from llama32.cache import CachedAttention
from llama32.engine import runner
from llama32.hub import resolve

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as on the command line
STEPS = 24
Seconds = defaultdict[str, float]
KINDS: dict[str, tuple[Any, str]] = {
    "products": (PackedLinear, "forward"),
    "of these, rounding activations": (RowInt8Linear, "round"),
    "attention": (CachedAttention, "__call__"),
    "norms": (modules.RMSNorm, "forward"),
    "rotation": (modules, "rotate"),
    "drawing": (runner, "draw"),
}


def counted(seconds: Seconds, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call; its time is added up."""

    def run(*args: Any, **given: Any) -> Any:
        start = time.perf_counter()
        answer = call(*args, **given)
        seconds[kind] += time.perf_counter() - start
        return answer

    return run


def profile(ours: Ours, prompts: list[list[int]], seconds: Seconds) -> dict[str, float]:
    """Seconds of a step by kind."""
    engine = ours.decoding(prompts, STEPS)
    steps = []
    for _ in range(STEADY + STEPS):
        seconds.clear()
        start = time.perf_counter()
        engine.step()
        steps.append({**dict.fromkeys(KINDS, 0.0), **seconds, "step": time.perf_counter() - start})
    found = {k: statistics.median(one[k] for one in steps[STEADY:]) for k in (*KINDS, "step")}
    inside = sum(found[kind] for kind in KINDS if not kind.startswith("of these"))
    return found | {"the rest": found["step"] - inside}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure where a step's time goes.")
    parser.add_argument("folder")
    parser.add_argument("--forms", nargs="+", default=["optimized", "int8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    seconds: Seconds = defaultdict(float)
    for kind, (owner, name) in KINDS.items():
        setattr(owner, name, counted(seconds, kind, getattr(owner, name)))
    folder, found = resolve(options.folder), {}
    for form in options.forms:
        ours = Ours(folder, form)
        for task, asked in Plan(folder, [], options.batches, ()).tasks.items():
            found[f"{form}, {task}"] = profile(ours, asked["prompts"], seconds)
        del ours
    rows = [
        [kind, *(f"{1000 * one[kind]:.1f}" for one in found.values())]
        for kind in (*KINDS, "the rest", "step")
    ]
    report = table(["ms of a step", *found], rows)
    print(report)
    if options.save:
        name = Path(folder).name
        command = (
            f"benchmarks/profiling.py {name} --forms {' '.join(options.forms)} "
            f"--batches {' '.join(map(str, options.batches))} --save"
        )
        keep(f"profiling_{name}", report, circumstances(command, ["torch"]), found)


if __name__ == "__main__":
    main()
