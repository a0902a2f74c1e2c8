"""Tensors in the files of a checkpoint, whole or in shards, and how to read them.

Files are memory-mapped, never read as a whole. A `StoredTensor` knows its files and copies all or a
part of itself into a given tensor, which sets the device and the dtype. Meta's q and k rows are
permuted in `StoredTensor.copy_to`.
"""

import json
import os
import pickle
import textwrap
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Num
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


class MappedFiles:
    """Mapped files, unmapped after every `budget` bytes read.

    Pages that were read count as memory of the process until the file is unmapped. Mapping a file
    anew for every tensor would hold the least memory, but would parse the pickles of Meta's layout
    hundreds of times.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes_read = 0
        self.getters: dict[Path, Callable[[str], Tensor]] = {}

    def get_tensor(self, file: Path, name: str, nbytes: int) -> Tensor:
        """Return a mapped tensor of `nbytes` bytes.

        The tensor keeps the file mapped: delete the tensor before the next call.
        """
        if self.bytes_read + nbytes > self.budget:
            self.getters.clear()
            self.bytes_read = 0
        self.bytes_read += nbytes
        if file not in self.getters:
            if file.suffix == ".safetensors":  # lazily: creating a tensor touches its pages
                self.getters[file] = safe_open(file, framework="pt").get_tensor
            else:
                self.getters[file] = map_tensors(file).__getitem__
        return self.getters[file](name)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one file, or in equal shards in several files."""

    name: str  # in the files
    files: tuple[Path, ...]
    shape: torch.Size  # of the whole tensor
    dtype: torch.dtype
    shard_axis: int = 0
    interleaved_pairs: int = 0  # R if the R rotary pairs of each head alternate: Meta's q and k

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def copy_to(self, out: Tensor, files: MappedFiles, axis: int = 0, start: int = 0) -> None:
        """Copy the tensor, or a slice, from the mapped files to the device and dtype of `out`.

        A slice begins at `start` along `axis` and has the shape of `out`; only the slice is copied.
        Meta's q and k rows are permuted to the Hub's order: row 2 * r + half of each head goes to
        row half * R + r, for R rotary pairs, r < R and half 0 or 1. (`permute` in transformers'
        convert_llama_weights_to_hf.py.) A slice of q or k rows must consist of whole heads.
        """
        size = self.shape[self.shard_axis] // len(self.files)
        first = start if axis == self.shard_axis else 0  # first and last row (or column) of `out`
        last = first + out.shape[self.shard_axis]
        for number, file in enumerate(self.files):
            low, high = max(first, number * size), min(last, (number + 1) * size)
            if low >= high:
                continue
            target = out.narrow(self.shard_axis, low - first, high - low)
            source = files.get_tensor(file, self.name, target.numel() * self.dtype.itemsize)
            source = source.narrow(self.shard_axis, low - number * size, high - low)
            if axis != self.shard_axis:
                source = source.narrow(axis, start, out.shape[axis])
            if self.interleaved_pairs:  # permute
                source = source.unflatten(0, (-1, self.interleaved_pairs, 2)).transpose(1, 2)
                target = target.unflatten(0, (-1, 2, self.interleaved_pairs))
            target.copy_(source)
            del source  # a mapped tensor keeps the file mapped

    def open_rows(self) -> "StoredRows | None":
        """Return a reader of single rows, or None unless one safetensors file holds the tensor."""
        file = self.files[0]
        if len(self.files) > 1 or file.suffix != ".safetensors" or not hasattr(os, "pread"):
            return None
        with file.open("rb") as opened:  # the header's length in 8 bytes, header, tensors
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        start = 8 + length + header[self.name]["data_offsets"][0]
        return StoredRows(file, start, self.shape[1:], self.dtype)

    def read(self) -> Tensor:
        """Return the tensor, mapped from its one file or assembled from its shards.

        A mapped tensor is not permuted: use `copy_to` for Meta's q and k.
        """
        files = MappedFiles(budget=self.nbytes)
        if len(self.files) == 1:
            return files.get_tensor(self.files[0], self.name, self.nbytes)
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(whole, files)
        return whole


class StoredRows:
    """A reader of single rows of a stored tensor.

    Rows are read, not mapped: each page of a mapping pulls up to half a megabyte of neighbours into
    the memory of the process, and truncating a mapped file kills the process. The file stays open:
    replacing or deleting the file is safe, overwriting is not.
    """

    def __init__(self, file: Path, start: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.path = file
        self.start = start
        self.shape = shape
        self.dtype = dtype
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __call__(self, ids: Int[Tensor, " n"]) -> Num[Tensor, "n ..."]:
        size = self.shape.numel() * self.dtype.itemsize
        offsets = [self.start + i * size for i in ids.tolist()]
        data = bytearray().join(os.pread(self._file, size, offset) for offset in offsets)
        if len(data) != len(offsets) * size:
            raise OSError(
                f"{self.path}: was cut short while its model is in use; load the model again"
            )
        if not data:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(-1, *self.shape)


# Errors that `load_file` and `torch.load` raised on files that were truncated or overwritten.
DAMAGED_FILE_ERRORS = (
    SafetensorError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    UnicodeDecodeError,
)


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Map all tensors of a file into memory, without reading their bytes.

    Raises ValueError if the file is damaged, could run code, or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGED_FILE_ERRORS as error:
        reason = textwrap.shorten(str(error), 100)
        raise ValueError(
            f"{file}: cannot be read ({type(error).__name__}: {reason}); if the file is cut short "
            "or damaged, download it again"
        ) from error
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: refused, because its pickle holds more than tensors and could run code; "
            "take the weights from a source that you trust, as safetensors"
        ) from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: holds a {type(tensors).__name__}, not a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name!r} is not the name of a tensor; is this a Llama?")
    return tensors


def summarize(names: Collection[str]) -> str:
    """Return the first three names and the number of further names, for an error message."""
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
