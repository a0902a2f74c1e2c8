"""Shared code of the benchmarks: tables, provenance and saved results.

Runs are interleaved as in `llama32 bench` (llama32/bench/interleave.py): calls take turns, and runs
disturbed by other processes are rejected and repeated.
"""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama32.bench.interleave import Run
from llama32.bench.report import Table

RESULTS = Path(__file__).parent / "results"


def timings(results: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, float]]]:
    """Return runs as plain values for the JSON file."""
    return {
        name: [
            {
                "seconds": round(run.seconds, 5),
                "others": round(run.others_share, 3),
                "rejected": run.rejected,
            }
            for run in runs
        ]
        for name, runs in results.items()
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return str(Table(head, list(rows)))


def provenance(
    command: str, packages: Sequence[str] = ("torch",), device: str = "cpu"
) -> dict[str, Any]:
    """Return command, date, machine and versions, to repeat a measurement."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    gpu = "" if device == "cpu" else f", {torch.cuda.get_device_name(device)}"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpu}",
        "versions": f"python {platform.python_version()}, {', '.join(versions)}",
    }


def bf16_note() -> str:
    """Return a note if the processor has no bf16 instructions; bf16 is then no faster than fp32."""
    info = Path("/proc/cpuinfo").read_text()
    has_bf16 = "avx512_bf16" in info or "amx_bf16" in info
    return "" if has_bf16 else "This processor has no bf16 instructions: bf16 is emulated in fp32."


def save_result(name: str, report: str, source: Mapping[str, Any], results: Any) -> None:
    """Write results/NAME.json and results/NAME.md, with the provenance as `source`."""
    RESULTS.mkdir(exist_ok=True)
    data = {**source, "found": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = "\n".join(f"- {key}: {value}" for key, value in source.items())
    (RESULTS / f"{name}.md").write_text(f"{report}\n\n{lines}\n")
