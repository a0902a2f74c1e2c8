"""Cost and gain of torch.compile: time to the first token, and speed.

The first token is timed with an empty compiler cache, and with the cache of an earlier process.

python benchmarks/compiling.py FOLDER|tiny [--runs 3] [--save]

Every weight format has a separate process, which loads the model, compiles, and generates a token.
Speeds are measured in turns (see measuring.py).
"""

import argparse
import os
import tempfile
from functools import partial

from measuring import RESULTS, provenance, save_result, table

from llama32.bench.interleave import disturbance, interleave, median_seconds
from llama32.bench.plan import Plan
from llama32.bench.run import Worker
from llama32.checkpoint.hub import resolve

FORMATS = "plain", "optimized", "compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure cost and gain of torch.compile.")
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    plan = Plan(resolve(options.folder), [], (1, 8), (512,), options.runs)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        first = Worker("llama32", "compiled", plan.folder)
        first.close()
        workers = {
            weight_format: Worker("llama32", weight_format, plan.folder)
            for weight_format in FORMATS
        }
        loading_times = {
            "compiled, the first time": first.loading,
            **{name: worker.loading for name, worker in workers.items()},
        }
        results = {}
        for task, call in plan.tasks.items():
            turns = {name: partial(worker.run_task, **call) for name, worker in workers.items()}
            results[task] = interleave(turns, options.runs)
        for worker in workers.values():
            worker.close()
    first_tokens = [
        [name, f"{loading['load']:.2f}", f"{loading['first']:.2f}"]
        for name, loading in loading_times.items()
    ]
    speeds = [
        [
            task,
            *(
                f"{plan.tokens_per_run(task) / median_seconds(runs):,.1f}"
                for runs in by_format.values()
            ),
        ]
        for task, by_format in results.items()
    ]
    all_runs = {
        f"{task}, {name}": runs
        for task, by_format in results.items()
        for name, runs in by_format.items()
    }
    report = (
        f"{table(['', 'loaded after, s', 'first token after, s'], first_tokens)}\n\n"
        f"{table(['tokens/s', *FORMATS], speeds)}\n\n{disturbance(all_runs)}."
    )
    print(report)
    if options.save:
        name = plan.folder.name
        command = f"benchmarks/compiling.py {name} --runs {options.runs} --save"
        seconds = {key: [round(run.seconds, 5) for run in runs] for key, runs in all_runs.items()}
        source = provenance(command, ["torch"])
        save_result(
            f"compiling_{name}", report, source, {"waits": loading_times, "seconds": seconds}
        )


if __name__ == "__main__":
    main()
