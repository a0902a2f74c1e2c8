"""`llama32 bench`: its options, and how what was measured is shown."""

from typing import Annotated

from typer import Argument, Option

from llama32 import hub
from llama32.bench.plan import Form, PeerName, Plan, plan_for
from llama32.bench.report import facts, footnote, rich_tables
from llama32.bench.run import measure
from llama32.options import print_json
from llama32.terminal import note, out


def bench(
    model: Annotated[str, Argument(help="A folder, a Hub id, or tiny.")] = "tiny",
    forms: Annotated[
        list[Form] | None,
        Option("--form", help="optimized (if none is given), plain, compiled, int8, int4."),
    ] = None,
    peers: Annotated[
        list[PeerName] | None,
        Option("--peer", help="transformers, llama.cpp, or both."),
    ] = None,
    batches: Annotated[list[int] | None, Option("--batch", help="By default 1 and 8.")] = None,
    prompts: Annotated[
        list[int] | None, Option("--prompt", help="By default 512 and 4096.")
    ] = None,
    runs: Annotated[int, Option(min=1, help="Of which the median counts.")] = 3,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure how fast a model is on this machine: decoding, prompts, loading, memory.

    Each contender runs in a process of its own, on all processors but in turns, and a turn that
    others disturbed is repeated. Peers get the same weights; llama.cpp as a GGUF file of the type
    that fits the first form, which is written for it.
    """
    plan = plan_for(
        hub.resolve(model),
        forms or [Form.optimized],
        peers or [],
        batches or Plan.batches,
        prompts or Plan.prompts,
        runs,
        tell=note,
    )
    found = measure(plan)
    if as_json:
        print_json({"model": model, **facts(plan, found)})
        return
    for each in rich_tables(plan, found):
        out.print(each)
        out.print()
    note(footnote(found))
