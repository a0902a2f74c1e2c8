"""Several gloo processes on one machine, for what only several can show."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

SECONDS = 240  # after which whatever still runs is ended


def in_processes(count: int, function: Callable, folder: Path, *args: Any) -> list[Any]:
    """What `function(mesh, *args)` returns in each of them, in the order of their ranks.

    The function has to be one that can be imported. They start from nothing, which takes some
    seconds, so one start had better answer many questions. They meet in a file of `folder`, not on
    a port, which another run might take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = count, folder, function, args
    context = spawn(_enter, given, nprocs=count, join=False)
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
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    result = function(init_device_mesh("cpu", (count,)), *args)
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()
