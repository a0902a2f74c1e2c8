"""`llama32 bench`: options and printed results."""

from typing import Annotated

from typer import Argument, Option

from llama32.bench.plan import PeerName, Plan, WeightFormat, make_plan
from llama32.bench.report import footnote, rich_tables, to_dict
from llama32.bench.run import measure
from llama32.checkpoint import hub
from llama32.cli.options import print_json
from llama32.cli.terminal import note, out


def bench(
    model: Annotated[str, Argument(help="A folder, a Hub id, or tiny.")] = "tiny",
    forms: Annotated[
        list[WeightFormat] | None,
        Option("--form", help="optimized (default), plain, compiled, int8 or int4; repeatable."),
    ] = None,
    peers: Annotated[
        list[PeerName] | None,
        Option("--peer", help="Also measure transformers or llama.cpp; repeatable."),
    ] = None,
    batches: Annotated[
        list[int] | None, Option("--batch", help="Requests decoded at once. [default: 1, 8]")
    ] = None,
    prompts: Annotated[
        list[int] | None, Option("--prompt", help="Prompt lengths in tokens. [default: 512, 4096]")
    ] = None,
    runs: Annotated[int, Option(min=1, help="Runs per measurement; the median is reported.")] = 3,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure a model on this machine: decode, prefill, loading and memory.

    Every backend runs in a separate process on all processors, and the runs of all backends are
    interleaved. A run disturbed by the rest of the machine is repeated. Peers use the same weights;
    llama.cpp reads a temporary GGUF file of the type that corresponds to the first form.
    """
    plan = make_plan(
        hub.resolve(model),
        forms or [WeightFormat.optimized],
        peers or [],
        batches or Plan.batches,
        prompts or Plan.prompts,
        runs,
        on_progress=note,
    )
    measurements = measure(plan)
    if as_json:
        print_json({"model": model, **to_dict(plan, measurements)})
        return
    for table in rich_tables(plan, measurements):
        out.print(table)
        out.print()
    note(footnote(measurements))
