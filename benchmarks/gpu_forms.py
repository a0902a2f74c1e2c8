"""Quantized layers on a GPU: decoding and prefill in every scheme, and unquantized.

python benchmarks/gpu_forms.py 1B [--schemes int8 int4 fp8] [--batches 1 8 64] [--runs 3] [--save]

Measured as in gpu.py, but GB/s count the weights alone. The selected kernels are printed first: if
a GPU supports no kernel for a scheme, the layers run unpacked, and slowly. quantization.py measures
the accuracy.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import CONTEXT, copy_bandwidth, decode_call, prefill_call
from make_random import SHAPES
from measuring import RESULTS, provenance, save_result, table, timings
from throughput import load

from llama32.bench.backends import weight_bytes
from llama32.bench.interleave import disturbance, interleave_in_process, median_seconds
from llama32.kernels.autotune import optimize
from llama32.model import Llama
from llama32.quantization.quantize import SCHEMES, quantize


def load_models(
    name: str, dtype: torch.dtype, device: str, schemes: Sequence[str]
) -> dict[str, Llama]:
    """Return the same weights unquantized and in each scheme."""
    models = {str(dtype).removeprefix("torch."): load(name, dtype, device)}
    for scheme in schemes:
        models[scheme] = quantize(load(name, dtype, device), scheme)
        print(optimize(models[scheme]))
    return models


def make_report(
    models: Mapping[str, Llama], device: str, batches: Sequence[int], prompt: int, runs: int
) -> tuple[str, dict[str, Any]]:
    bandwidth, all_runs = copy_bandwidth(device), {}
    tasks = {
        f"decoding {n}": (n, {k: decode_call(m, device, n) for k, m in models.items()})
        for n in batches
    }
    tasks[f"prompt of {prompt}"] = (
        prompt,
        {k: prefill_call(m, device, prompt) for k, m in models.items()},
    )
    rows = []
    for task, (tokens, calls) in tasks.items():
        results = interleave_in_process(calls, runs)
        first = median_seconds(next(iter(results.values())))
        for name, scheme_runs in results.items():
            seconds = median_seconds(scheme_runs)
            rate = weight_bytes(models[name]) / seconds
            share = [f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.0%}"]
            cells = share if task.startswith("decoding") else ["", ""]
            rows.append([task, name, f"{tokens / seconds:,.0f}", f"{first / seconds:.2f}", *cells])
            all_runs[f"{task}, {name}"] = scheme_runs
    sizes = [[name, f"{weight_bytes(model) / 1e9:.2f}"] for name, model in models.items()]
    report = (
        f"Decoding after {CONTEXT} tokens; a copy moves {bandwidth / 1e9:,.0f} GB/s.\n\n"
        f"{table(['weights', 'GB'], sizes)}\n\n"
        f"{table(['', '', 'tokens/s', 'times', 'GB/s', 'of the copy'], rows)}\n\n"
        f"{disturbance(all_runs)}."
    )
    return report, {"copy, bytes per second": bandwidth, "runs": timings(all_runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure quantized layers on a GPU.")
    parser.add_argument("model", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--schemes", nargs="*", default=[*SCHEMES], choices=[*SCHEMES])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    name = Path(options.model).name
    dtype = getattr(torch, options.dtype)
    models = load_models(options.model, dtype, options.device, options.schemes)
    report, results = make_report(
        models, options.device, options.batches, options.prompt, options.runs
    )
    report = f"{name}, {options.device}.\n\n{report}"
    print(report)
    if options.save:
        command = (
            f"benchmarks/gpu_forms.py {name} --device {options.device} --dtype {options.dtype} "
            f"--schemes {' '.join(options.schemes)} "
            f"--batches {' '.join(map(str, options.batches))} --prompt {options.prompt} "
            f"--runs {options.runs} --save"
        )
        source = provenance(command, ("torch",), options.device)
        save_result(f"gpu_forms_{name}", report, source, results)


if __name__ == "__main__":
    main()
