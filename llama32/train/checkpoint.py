"""Reading `training.pt`, the checkpoint for resuming a run."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

# Old name -> new name. Files of version 0.1.0 hold the old names, and stay readable.
RENAMED = {
    "recipe": "config",  # a key of the file
    "recompute": "activation_checkpointing",  # a field of TrainConfig
    ".pair.a": ".lora.a",  # the end of a parameter name, in the weights and in the optimizer state
    ".pair.b": ".lora.b",
}
KEYS = {"config", "step", "curve", "model", "optimizer"}
# For files of other kinds: errors of `torch.load`, and of an object that is not a dictionary.
CHECKPOINT_ERRORS = (RuntimeError, UnpicklingError, EOFError, AttributeError, LookupError)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, with the names of today.

    Raises ValueError if the file is not a checkpoint of a training run.
    """
    try:
        saved = rename(torch.load(file, map_location="cpu", weights_only=True))
        is_complete = saved.keys() >= KEYS
    except CHECKPOINT_ERRORS:
        is_complete = False
    if not is_complete:
        raise ValueError(f"{file}: not the checkpoint of a run; delete it to begin anew")
    return saved


def rename(value: Any) -> Any:
    """Replace old names in dictionary keys and lists, at any depth."""
    match value:
        case dict():
            return {rename(key): rename(entry) for key, entry in value.items()}
        case list():
            return [rename(entry) for entry in value]
        case str():
            return new_name(value)
    return value


def new_name(name: str) -> str:
    """Return the present name of a key, a field or a parameter."""
    if name in RENAMED:
        return RENAMED[name]
    for old, new in RENAMED.items():
        if old.startswith(".") and name.endswith(old):
            return name.removesuffix(old) + new
    return name
