"""`llama32 bench` on a folder, with the tables saved in results/.

python benchmarks/speed.py FOLDER [--backends "llama32, optimized" "llama.cpp, BF16" ...]
"""

import argparse
import os
import sys
from pathlib import Path

from measuring import RESULTS, provenance, save_result

from llama32.bench.plan import Plan
from llama32.bench.report import footnote, tables, to_dict
from llama32.bench.run import measure

DEFAULT_BACKENDS = (
    "llama32, optimized",
    "llama32, int8",
    "llama32, plain",
    "transformers, as stored",
    "llama.cpp, BF16",
    "llama.cpp, Q8_0",
)
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp_python"}


def command_line(options: argparse.Namespace) -> str:
    """Return the command to repeat the measurement."""
    backends = " ".join(f'"{backend}"' for backend in options.backends)
    numbers = (f"--{k} {' '.join(map(str, getattr(options, k)))}" for k in ("batches", "prompts"))
    arguments = f"--backends {backends} {' '.join(numbers)} --runs {options.runs}"
    return f"benchmarks/speed.py {options.folder.name} {arguments} --save {options.save}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory of llama32 and peers.")
    parser.add_argument("folder", type=Path)
    # Committed results name the option --contenders.
    parser.add_argument("--backends", "--contenders", nargs="+", default=DEFAULT_BACKENDS)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", help=f"name of the result in {RESULTS.name}/")
    options = parser.parse_args()
    backends = [tuple(backend.split(", ", 1)) for backend in options.backends]
    plan = Plan(
        options.folder,
        backends,
        options.batches,
        options.prompts,
        options.runs,
        on_progress=lambda line: print(line, file=sys.stderr),
    )
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # for all workers, as the command line sets
    results = measure(plan)
    report = "\n\n".join([*map(str, tables(plan, results)), f"{footnote(results)}."])
    print(report)
    if options.save:
        measured = {name for name, _ in backends}
        packages = ["torch", *(PACKAGES[name] for name in PACKAGES if name in measured)]
        save_result(
            options.save,
            report,
            provenance(command_line(options), packages),
            to_dict(plan, results),
        )


if __name__ == "__main__":
    main()
