"""Time and memory of loading, compared with transformers.

python benchmarks/load.py folder [--dtype float32] [--runs 5] [--save]

Every run is a fresh process; the loaders take turns, so a slow moment of the machine hits both. The
files are in the page cache, so the disk plays no part. Reported are medians of: seconds until
loading returns; seconds until the logits of a first token, since transformers maps the weights and
reads them at first use; peak memory above that of the process before loading.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import RESULTS, provenance, save_result, table

from llama32.bench.worker import resident_bytes

LOADERS = ("llama32", "transformers")
COLUMNS = {
    "load": "load, s",
    "first": "first logits, s",
    "peak": "peak of load, MB",
    "peak_first": "peak of first logits, MB",
}


def measure(loader: str, folder: str, dtype: str | None) -> dict[str, float]:
    """Load once in the current process and return the measured values."""
    import torch

    load_dtype = getattr(torch, dtype) if dtype else None
    load: Callable[..., Any]
    if loader == "llama32":
        from llama32.checkpoint.reader import read_model as load
    else:
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        load, load_dtype = LlamaForCausalLM.from_pretrained, load_dtype or "auto"
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # starts the threads
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    model = load(folder, dtype=load_dtype)
    loaded, peak = time.perf_counter(), resident_bytes("VmHWM")
    with torch.inference_mode():
        model(torch.ones(1, 1, dtype=torch.long))
    first = time.perf_counter()
    return {
        "load": loaded - start,
        "first": first - start,
        "peak": (peak - before) / 1e6,
        "peak_first": (resident_bytes("VmHWM") - before) / 1e6,
    }


def compare(folder: Path, dtype: str | None, runs: int) -> dict[str, dict[str, list[float]]]:
    """Run both loaders in turns, after an uncounted run of each."""
    results: dict[str, dict[str, list[float]]] = {
        loader: {column: [] for column in COLUMNS} for loader in LOADERS
    }
    for run in range(runs + 1):
        for loader in LOADERS:
            command = [sys.executable, __file__, str(folder), "--worker", loader]
            command += ["--dtype", dtype] if dtype else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            if run:
                for column, value in json.loads(output).items():
                    results[loader][column].append(round(value, 3))
    return results


def loading_table(results: dict[str, dict[str, list[float]]]) -> str:
    rows = (
        [loader, *(f"{statistics.median(columns[c]):,.2f}" for c in COLUMNS)]
        for loader, columns in results.items()
    )
    return table(["", *COLUMNS.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure loading, compared with transformers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", help="default: as stored")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS}")
    parser.add_argument("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, str(options.folder), options.dtype)))
        return
    from llama32.checkpoint.reader import inspect

    summary = str(inspect(options.folder)).replace(str(options.folder), options.folder.name)
    results = compare(options.folder, options.dtype, options.runs)
    report = f"{summary}\n\nLoaded as {options.dtype or 'stored'}:\n\n{loading_table(results)}"
    print(report)
    if options.save:
        dtype = f" --dtype {options.dtype}" if options.dtype else ""
        command = f"benchmarks/load.py {options.folder.name}{dtype} --runs {options.runs} --save"
        source = provenance(command, ("torch", "transformers"))
        save_result(
            f"load_{options.folder.name}_{options.dtype or 'stored'}", report, source, results
        )


if __name__ == "__main__":
    main()
