"""What is to be measured, and beside whom."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama32.checkpoint import inspect

CONTEXT, STEPS = 128, 24  # of decoding: tokens before it, and steps that count


@dataclass(frozen=True)
class Plan:
    """What is to be measured. `tell` hears what is going on."""

    folder: Path
    contenders: Sequence[tuple[str, str]]  # name and form; see `contenders.py`
    batches: Sequence[int] = (1, 8)
    prompts: Sequence[int] = (512, 4096)
    runs: int = 3
    tell: Callable[[str], None] = field(default=lambda what: None)

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What workers are asked for, by what it is called."""
        config = inspect(self.folder).config
        draw = random.Random(0)
        longest = config.max_position_embeddings - 2 * CONTEXT

        def prompt(length: int) -> list[int]:
            return [draw.randrange(config.vocab_size) for _ in range(min(length, longest))]

        decode = [[prompt(CONTEXT) for _ in range(n)] for n in self.batches]
        prefill = [prompt(n) for n in self.prompts]
        return {
            **{
                f"decode, batch {len(prompts)}": {
                    "what": "decode",
                    "prompts": prompts,
                    "steps": STEPS,
                }
                for prompts in decode
            },
            **{f"prefill, {len(ids):,}": {"what": "prefill", "prompt": ids} for ids in prefill},
        }

    def tokens(self, task: str) -> int:
        """Of a run: those that a step gives, or those that are read."""
        asked = self.tasks[task]
        return len(asked["prompts"] if asked["what"] == "decode" else asked["prompt"])


class Form(StrEnum):
    """What the weights may be made before they are used."""

    optimized = "optimized"
    plain = "plain"
    compiled = "compiled"
    int8 = "int8"
    int4 = "int4"


class PeerName(StrEnum):
    """Whom to measure beside."""

    transformers = "transformers"
    llama_cpp = "llama.cpp"


MODULES = {PeerName.transformers: ["transformers"], PeerName.llama_cpp: ["llama_cpp", "gguf"]}
GGUF_TYPES = {Form.int8: "Q8_0", Form.int4: "Q4_0"}


def plan_for(
    folder: Path, forms: Sequence[Form], peers: Sequence[PeerName], *numbers: Any, **more: Any
) -> Plan:
    """ValueError where a peer is not installed."""
    for peer in peers:
        if None in map(find_spec, MODULES[peer]):
            raise ValueError(f"--peer {peer}: not installed; pip install 'llama32[bench]'")
    theirs = {
        PeerName.transformers: "as stored",
        PeerName.llama_cpp: GGUF_TYPES.get(forms[0], "BF16"),
    }
    contenders = [("llama32", str(form)) for form in forms]
    contenders += [(str(peer), theirs[peer]) for peer in peers]
    return Plan(folder, contenders, *numbers, **more)
