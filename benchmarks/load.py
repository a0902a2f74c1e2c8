"""How long loading takes and how much memory, beside transformers.

python benchmarks/load.py folder [--dtype float32] [--runs 5] [--save]

Every run is a fresh process; the two take turns, so a slow moment of the machine meets both. The
files were read before, so the disk plays no part. Medians of these: seconds until the
load returns; seconds until the first token's logits are there, since transformers maps the weights
and reads them only when they are used; the peak of memory over that of the bare process.
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

from measuring import RESULTS, circumstances, keep, table

from llama32.bench.worker import resident

LOADERS = ("llama32", "transformers")
COLUMNS = {
    "load": "load, s",
    "first": "first logits, s",
    "peak": "peak of load, MB",
    "peak_first": "peak of first logits, MB",
}


def measure(loader: str, folder: str, dtype: str | None) -> dict[str, float]:
    """One load in this process."""
    import torch

    wanted = getattr(torch, dtype) if dtype else None
    load: Callable[..., Any]
    if loader == "llama32":
        from llama32.checkpoint import load_model as load
    else:
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        load, wanted = LlamaForCausalLM.from_pretrained, wanted or "auto"
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # wakes the threads
    before, start = resident("VmRSS"), time.perf_counter()
    model = load(folder, dtype=wanted)
    loaded, peak = time.perf_counter(), resident("VmHWM")
    with torch.inference_mode():
        model(torch.ones(1, 1, dtype=torch.long))
    first = time.perf_counter()
    return {
        "load": loaded - start,
        "first": first - start,
        "peak": (peak - before) / 1e6,
        "peak_first": (resident("VmHWM") - before) / 1e6,
    }


def compare(folder: Path, dtype: str | None, runs: int) -> dict[str, dict[str, list[float]]]:
    """All runs of both loaders, after one of each that is not counted."""
    found: dict[str, dict[str, list[float]]] = {
        loader: {column: [] for column in COLUMNS} for loader in LOADERS
    }
    for run in range(runs + 1):
        for loader in LOADERS:
            command = [sys.executable, __file__, str(folder), "--worker", loader]
            command += ["--dtype", dtype] if dtype else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            if run:
                for column, value in json.loads(output).items():
                    found[loader][column].append(round(value, 3))
    return found


def report_table(found: dict[str, dict[str, list[float]]]) -> str:
    rows = (
        [loader, *(f"{statistics.median(columns[c]):,.2f}" for c in COLUMNS)]
        for loader, columns in found.items()
    )
    return table(["", *COLUMNS.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure loading beside transformers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", help="as it is stored unless given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS}")
    parser.add_argument("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, str(options.folder), options.dtype)))
        return
    from llama32.checkpoint import inspect

    about = str(inspect(options.folder)).replace(str(options.folder), options.folder.name)
    found = compare(options.folder, options.dtype, options.runs)
    report = f"{about}\n\nLoaded as {options.dtype or 'stored'}:\n\n{report_table(found)}"
    print(report)
    if options.save:
        dtype = f" --dtype {options.dtype}" if options.dtype else ""
        command = f"benchmarks/load.py {options.folder.name}{dtype} --runs {options.runs} --save"
        kept = circumstances(command, ("torch", "transformers"))
        keep(f"load_{options.folder.name}_{options.dtype or 'stored'}", report, kept, found)


if __name__ == "__main__":
    main()
