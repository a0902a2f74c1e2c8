"""`llama32 bench` on a folder, with its tables kept in results/.

python benchmarks/speed.py FOLDER [--contenders "llama32, optimized" "llama.cpp, BF16" ...]
"""

import argparse
import os
import sys
from pathlib import Path

from measuring import RESULTS, circumstances, keep

from llama32.bench.plan import Plan
from llama32.bench.report import facts, footnote, tables
from llama32.bench.run import measure

USUAL = (
    "llama32, optimized",
    "llama32, int8",
    "llama32, plain",
    "transformers, as stored",
    "llama.cpp, BF16",
    "llama.cpp, Q8_0",
)
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp_python"}


def command(options: argparse.Namespace) -> str:
    """To measure the same again."""
    contenders = " ".join(f'"{one}"' for one in options.contenders)
    numbers = (f"--{k} {' '.join(map(str, getattr(options, k)))}" for k in ("batches", "prompts"))
    given = f"--contenders {contenders} {' '.join(numbers)} --runs {options.runs}"
    return f"benchmarks/speed.py {options.folder.name} {given} --save {options.save}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory beside peers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contenders", nargs="+", default=USUAL)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", help=f"a name to keep the result under in {RESULTS.name}/")
    options = parser.parse_args()
    contenders = [tuple(one.split(", ", 1)) for one in options.contenders]
    plan = Plan(
        options.folder,
        contenders,
        options.batches,
        options.prompts,
        options.runs,
        tell=lambda what: print(what, file=sys.stderr),
    )
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # for all, as on the command line
    found = measure(plan)
    report = "\n\n".join([*map(str, tables(plan, found)), f"{footnote(found)}."])
    print(report)
    if options.save:
        asked = {name for name, _ in contenders}
        packages = ["torch", *(PACKAGES[name] for name in PACKAGES if name in asked)]
        keep(options.save, report, circumstances(command(options), packages), facts(plan, found))


if __name__ == "__main__":
    main()
