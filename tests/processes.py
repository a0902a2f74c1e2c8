"""Several gloo processes on one machine, for tests of distributed code."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

SECONDS = 240  # time limit; the processes are killed afterwards


def in_processes(count: int, function: Callable, folder: Path, *args: Any) -> list[Any]:
    """Run `function(mesh, *args)` in `count` processes; return the results in order of rank.

    The function must be importable. Starting the processes takes some seconds, so a test should
    check as much as possible in a single start. The rendezvous is a file in `folder`, because
    another run might take a port.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = spawn(_enter, (count, folder, function, args), nprocs=count, join=False)
    assert context is not None
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, f"{count} processes did not end in {SECONDS} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _enter(rank: int, count: int, folder: Path, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    result = function(init_device_mesh("cpu", (count,)), *args)
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()
