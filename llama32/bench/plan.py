"""Benchmark plans: the backends to measure, and the tasks for each."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama32.checkpoint.reader import inspect

CONTEXT, STEPS = 128, 24  # prompt tokens before decoding, and timed decode steps


@dataclass(frozen=True)
class Plan:
    """A benchmark: backends, tasks and repeats. `on_progress` receives status lines."""

    folder: Path
    backends: Sequence[tuple[str, str]]  # name in `backends.BACKENDS`, and weight format
    batches: Sequence[int] = (1, 8)
    prompts: Sequence[int] = (512, 4096)  # lengths of the prefill tasks
    runs: int = 3
    on_progress: Callable[[str], None] = field(default=lambda line: None)

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Calls of backend methods by task name: "method" and the keyword arguments."""
        config = inspect(self.folder).config
        rng = random.Random(0)
        max_length = config.max_position_embeddings - 2 * CONTEXT

        def prompt(length: int) -> list[int]:
            return [rng.randrange(config.vocab_size) for _ in range(min(length, max_length))]

        decode = [[prompt(CONTEXT) for _ in range(n)] for n in self.batches]
        prefill = [prompt(n) for n in self.prompts]
        return {
            **{
                f"decode, batch {len(prompts)}": {
                    "method": "decode",
                    "prompts": prompts,
                    "steps": STEPS,
                }
                for prompts in decode
            },
            **{f"prefill, {len(ids):,}": {"method": "prefill", "prompt": ids} for ids in prefill},
        }

    def tokens_per_run(self, task: str) -> int:
        """Return the tokens that a decode step generates, or that a prefill reads."""
        call = self.tasks[task]
        return len(call["prompts"] if call["method"] == "decode" else call["prompt"])


class WeightFormat(StrEnum):
    """Weight formats of llama32: packed, compiled or quantized after loading."""

    optimized = "optimized"
    plain = "plain"
    compiled = "compiled"
    int8 = "int8"
    int4 = "int4"


class PeerName(StrEnum):
    """Programs to compare with."""

    transformers = "transformers"
    llama_cpp = "llama.cpp"


PEER_MODULES = {PeerName.transformers: ["transformers"], PeerName.llama_cpp: ["llama_cpp", "gguf"]}
GGUF_TYPES = {WeightFormat.int8: "Q8_0", WeightFormat.int4: "Q4_0"}


def make_plan(
    folder: Path,
    formats: Sequence[WeightFormat],
    peers: Sequence[PeerName],
    *numbers: Any,
    **options: Any,
) -> Plan:
    """Return a plan for llama32 in all formats, and for the peers.

    llama.cpp gets the GGUF type nearest to the first format. Raises ValueError if a peer is not
    installed.
    """
    for peer in peers:
        if None in map(find_spec, PEER_MODULES[peer]):
            raise ValueError(f"--peer {peer}: not installed; pip install 'llama32[bench]'")
    peer_formats = {
        PeerName.transformers: "as stored",
        PeerName.llama_cpp: GGUF_TYPES.get(formats[0], "BF16"),
    }
    backends = [("llama32", str(weight_format)) for weight_format in formats]
    backends += [(str(peer), peer_formats[peer]) for peer in peers]
    return Plan(folder, backends, *numbers, **options)
