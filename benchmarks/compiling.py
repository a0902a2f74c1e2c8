"""What torch.compile costs and gives: the time to a first token, with nothing compiled before and
with the compiler's cache filled by an earlier process, and the speed afterwards.

python benchmarks/compiling.py FOLDER|tiny [--runs 3] [--save]

Every form runs in a process of its own, which loads the model, compiles, and answers one token.
The speeds are taken in turns between the forms (see measuring.py).
"""

import argparse
import os
import tempfile
from functools import partial

from measuring import RESULTS, circumstances, keep, table

from llama32.bench.plan import Plan
from llama32.bench.run import Worker
from llama32.bench.turns import disturbance, interleave, median
from llama32.hub import resolve

FORMS = "plain", "optimized", "compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what compiling costs and gives.")
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    plan = Plan(resolve(options.folder), [], (1, 8), (512,), options.runs)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        first = Worker("llama32", "compiled", plan.folder)
        first.close()
        workers = {form: Worker("llama32", form, plan.folder) for form in FORMS}
        waits = {
            "compiled, the first time": first.loading,
            **{form: worker.loading for form, worker in workers.items()},
        }
        found = {}
        for task, asked in plan.tasks.items():
            turns = {form: partial(worker.turn, **asked) for form, worker in workers.items()}
            found[task] = interleave(turns, options.runs)
        for worker in workers.values():
            worker.close()
    until = [[form, f"{of['load']:.2f}", f"{of['first']:.2f}"] for form, of in waits.items()]
    speeds = [
        [task, *(f"{plan.tokens(task) / median(runs):,.1f}" for runs in each.values())]
        for task, each in found.items()
    ]
    every = {f"{task}, {form}": runs for task, each in found.items() for form, runs in each.items()}
    report = (
        f"{table(['', 'loaded after, s', 'first token after, s'], until)}\n\n"
        f"{table(['tokens/s', *FORMS], speeds)}\n\n{disturbance(every)}."
    )
    print(report)
    if options.save:
        name = plan.folder.name
        command = f"benchmarks/compiling.py {name} --runs {options.runs} --save"
        seconds = {key: [round(run.seconds, 5) for run in runs] for key, runs in every.items()}
        kept = circumstances(command, ["torch"])
        keep(f"compiling_{name}", report, kept, {"waits": waits, "seconds": seconds})


if __name__ == "__main__":
    main()
