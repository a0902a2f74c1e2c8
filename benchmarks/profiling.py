"""Time of a decode step by part: products with weights, attention, and the rest.

python benchmarks/profiling.py FOLDER [--forms optimized int8] [--batches 1 8] [--save]

Wall time of each kind of call, as the median over steps. "of these" rows are contained in the row
above; all other kinds are disjoint. Timing costs a few microseconds for each of some hundred calls.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import RESULTS, provenance, save_result, table

from llama32 import model as modules
from llama32.bench.backends import WARMUP_STEPS, Llama32Backend
from llama32.bench.plan import Plan
from llama32.cache.kv_cache import CachedAttention
from llama32.checkpoint.hub import resolve
from llama32.engine import runner
from llama32.kernels.packed_int import RowInt8Linear
from llama32.kernels.packed_linear import PackedLinear

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as the command line sets
STEPS = 24
Seconds = defaultdict[str, float]
KINDS: dict[str, tuple[Any, str]] = {
    "products": (PackedLinear, "forward"),
    "of these, rounding activations": (RowInt8Linear, "quantize_rows"),
    "attention": (CachedAttention, "__call__"),
    "norms": (modules.RMSNorm, "forward"),
    "rotary": (modules, "apply_rotary"),
    "sampling": (runner, "sample_next_tokens"),
}


def timed(seconds: Seconds, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function, with calls timed and added to `seconds`."""

    def run(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **options)
        seconds[kind] += time.perf_counter() - start
        return result

    return run


def profile(
    backend: Llama32Backend, prompts: list[list[int]], seconds: Seconds
) -> dict[str, float]:
    """Return the median seconds of a step by kind of call."""
    engine = backend.start_decoding(prompts, STEPS)
    steps = []
    for _ in range(WARMUP_STEPS + STEPS):
        seconds.clear()
        start = time.perf_counter()
        engine.step()
        steps.append({**dict.fromkeys(KINDS, 0.0), **seconds, "step": time.perf_counter() - start})
    timed_steps = steps[WARMUP_STEPS:]
    medians = {k: statistics.median(step[k] for step in timed_steps) for k in (*KINDS, "step")}
    attributed = sum(medians[kind] for kind in KINDS if not kind.startswith("of these"))
    return medians | {"the rest": medians["step"] - attributed}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time of a decode step by part.")
    parser.add_argument("folder")
    parser.add_argument("--forms", nargs="+", default=["optimized", "int8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    seconds: Seconds = defaultdict(float)
    for kind, (owner, name) in KINDS.items():
        setattr(owner, name, timed(seconds, kind, getattr(owner, name)))
    folder, profiles = resolve(options.folder), {}
    for weight_format in options.forms:
        backend = Llama32Backend(folder, weight_format)
        for task, call in Plan(folder, [], options.batches, ()).tasks.items():
            profiles[f"{weight_format}, {task}"] = profile(backend, call["prompts"], seconds)
        del backend  # frees the weights before the next format loads
    rows = [
        [kind, *(f"{1000 * medians[kind]:.1f}" for medians in profiles.values())]
        for kind in (*KINDS, "the rest", "step")
    ]
    report = table(["ms of a step", *profiles], rows)
    print(report)
    if options.save:
        name = Path(folder).name
        command = (
            f"benchmarks/profiling.py {name} --forms {' '.join(options.forms)} "
            f"--batches {' '.join(map(str, options.batches))} --save"
        )
        save_result(f"profiling_{name}", report, provenance(command, ["torch"]), profiles)


if __name__ == "__main__":
    main()
