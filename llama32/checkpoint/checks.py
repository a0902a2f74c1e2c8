"""Checks of a checkpoint's tensors against the config: names, shapes and dtypes."""

from collections.abc import Mapping
from pathlib import Path

import torch

from llama32.checkpoint.tensor_files import StoredTensor, summarize

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in config.json, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_dtypes(
    folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, torch.dtype]
) -> None:
    """Raise ValueError unless float weights are floats and quantized weights have their dtype."""
    quantized = {
        name: dtype_name(dtype) for name, dtype in expected.items() if dtype not in FLOAT_DTYPES
    }
    for name, tensor in stored.items():
        dtype = dtype_name(tensor.dtype)
        if name in quantized and dtype != quantized[name]:
            raise ValueError(f"{folder}: {name} in {dtype}, but config.json says {quantized[name]}")
    not_float = [name for name, tensor in stored.items() if tensor.dtype not in FLOAT_DTYPES]
    if odd := [name for name in not_float if name not in quantized]:
        dtype = dtype_name(stored[odd[0]].dtype)
        raise ValueError(f"{folder}: {summarize(odd)} in {dtype}; only float weights load")


def check_shapes(
    source: object,
    shapes: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    advice: str,
) -> None:
    """Raise ValueError, with advice, if tensors are missing or unexpected or shapes differ."""
    if missing := expected.keys() - shapes.keys():
        problem = f"{len(missing)} of {len(expected)} tensors are missing: {summarize(missing)}"
    elif extra := shapes.keys() - expected.keys():
        problem = f"unexpected tensors: {summarize(extra)}"
    elif wrong := [name for name, shape in expected.items() if shapes[name] != shape]:
        both = [f"{name} {[*shapes[name]]} (expected {[*expected[name]]})" for name in wrong]
        problem = f"shapes differ from the config: {summarize(both)}"
    else:
        return
    raise ValueError(f"{source}: {problem}; {advice}")
