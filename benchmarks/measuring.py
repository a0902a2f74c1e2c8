"""What the benchmarks share: how a result is told and kept. Turns are those of `llama32 bench`."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama32.bench.report import Table
from llama32.bench.turns import Run

RESULTS = Path(__file__).parent / "results"


def timings(found: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, float]]]:
    """As they are kept in the JSON."""
    return {
        name: [
            {
                "seconds": round(run.seconds, 5),
                "others": round(run.others, 3),
                "rejected": run.rejected,
            }
            for run in runs
        ]
        for name, runs in found.items()
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return str(Table(head, list(rows)))


def circumstances(
    command: str, packages: Sequence[str] = ("torch",), device: str = "cpu"
) -> dict[str, Any]:
    """What someone needs to know to measure the same again."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    gpu = "" if device == "cpu" else f", {torch.cuda.get_device_name(device)}"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpu}",
        "versions": f"python {platform.python_version()}, {', '.join(versions)}",
    }


def bf16_note() -> str:
    """Whether this processor multiplies bf16, without which it is no faster than fp32."""
    info = Path("/proc/cpuinfo").read_text()
    has = "avx512_bf16" in info or "amx_bf16" in info
    return "" if has else "This processor has no bf16 instructions: bf16 is emulated in fp32."


def keep(name: str, report: str, kept: Mapping[str, Any], found: Any) -> None:
    """As results/NAME.json and results/NAME.md."""
    RESULTS.mkdir(exist_ok=True)
    data = {**kept, "found": found}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = "\n".join(f"- {key}: {value}" for key, value in kept.items())
    (RESULTS / f"{name}.md").write_text(f"{report}\n\n{lines}\n")
