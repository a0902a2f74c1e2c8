"""Quantized layers on a GPU: decoding and a prompt in every scheme, beside the weights as they are.

python benchmarks/gpu_forms.py 1B [--schemes int8 int4 fp8] [--batches 1 8 64] [--runs 3] [--save]

As in gpu.py; GB/s are of the weights alone. What forms the layers got is printed first: where a
chip has none for a scheme, its layers run plain, and slowly. Accuracy: quantization.py.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import CONTEXT, copy_bandwidth, decoding, reading
from make_random import SHAPES
from measuring import RESULTS, circumstances, keep, table, timings
from throughput import load

from llama32.adapt.optimize import optimize
from llama32.adapt.quantize import SCHEMES, quantize
from llama32.bench.contenders import weight_bytes
from llama32.bench.turns import disturbance, median, take_turns
from llama32.model import Llama


def models_of(
    name: str, dtype: torch.dtype, device: str, schemes: Sequence[str]
) -> dict[str, Llama]:
    """The same weights, as they are and in each scheme."""
    found = {str(dtype).removeprefix("torch."): load(name, dtype, device)}
    for scheme in schemes:
        found[scheme] = quantize(load(name, dtype, device), scheme)
        print(optimize(found[scheme]))
    return found


def report_of(
    models: Mapping[str, Llama], device: str, batches: Sequence[int], prompt: int, runs: int
) -> tuple[str, dict[str, Any]]:
    bandwidth, every = copy_bandwidth(device), {}
    tasks = {
        f"decoding {n}": (n, {k: decoding(m, device, n) for k, m in models.items()})
        for n in batches
    }
    tasks[f"prompt of {prompt}"] = (
        prompt,
        {k: reading(m, device, prompt) for k, m in models.items()},
    )
    rows = []
    for task, (tokens, peers) in tasks.items():
        found = take_turns(peers, runs)
        first = median(next(iter(found.values())))
        for name, its_runs in found.items():
            seconds = median(its_runs)
            rate = weight_bytes(models[name]) / seconds
            share = [f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.0%}"]
            shown = share if task.startswith("decoding") else ["", ""]
            rows.append([task, name, f"{tokens / seconds:,.0f}", f"{first / seconds:.2f}", *shown])
            every[f"{task}, {name}"] = its_runs
    sizes = [[name, f"{weight_bytes(model) / 1e9:.2f}"] for name, model in models.items()]
    report = (
        f"Decoding after {CONTEXT} tokens; a copy moves {bandwidth / 1e9:,.0f} GB/s.\n\n"
        f"{table(['weights', 'GB'], sizes)}\n\n"
        f"{table(['', '', 'tokens/s', 'times', 'GB/s', 'of the copy'], rows)}\n\n"
        f"{disturbance(every)}."
    )
    return report, {"copy, bytes per second": bandwidth, "runs": timings(every)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure quantized layers on a GPU.")
    parser.add_argument("model", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--schemes", nargs="*", default=[*SCHEMES], choices=[*SCHEMES])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    name = Path(options.model).name
    dtype = getattr(torch, options.dtype)
    models = models_of(options.model, dtype, options.device, options.schemes)
    report, found = report_of(models, options.device, options.batches, options.prompt, options.runs)
    report = f"{name}, {options.device}.\n\n{report}"
    print(report)
    if options.save:
        command = (
            f"benchmarks/gpu_forms.py {name} --device {options.device} --dtype {options.dtype} "
            f"--schemes {' '.join(options.schemes)} "
            f"--batches {' '.join(map(str, options.batches))} --prompt {options.prompt} "
            f"--runs {options.runs} --save"
        )
        kept = circumstances(command, ("torch",), options.device)
        keep(f"gpu_forms_{name}", report, kept, found)


if __name__ == "__main__":
    main()
