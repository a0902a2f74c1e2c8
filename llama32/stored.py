"""Where a tensor lies in the files of a checkpoint, and how it is read.

Files are mapped, never read as a whole. A `StoredTensor` says where a tensor lies, in one piece or
cut into shards, and copies it into memory that says by itself which device and dtype are wanted.
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
    """Files that stay mapped until `budget` bytes have been read from them.

    Pages that were read count as memory of this process until their file is unmapped. To map anew
    for every tensor would hold the least, but parses the pickles of Meta's layout hundreds of
    times.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.read = 0
        self.open: dict[Path, Callable[[str], Tensor]] = {}

    def tensor(self, file: Path, name: str, nbytes: int) -> Tensor:
        """A mapped tensor of that size. Let go of it before the next: it keeps its file mapped."""
        if self.read + nbytes > self.budget:
            self.open.clear()
            self.read = 0
        self.read += nbytes
        if file not in self.open:
            if file.suffix == ".safetensors":  # one by one: to make a tensor touches its pages
                self.open[file] = safe_open(file, framework="pt").get_tensor
            else:
                self.open[file] = map_tensors(file).__getitem__
        return self.open[file](name)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: whole in one file, or in equal pieces over several."""

    name: str  # as the files call it
    files: tuple[Path, ...]
    shape: torch.Size  # of the whole
    dtype: torch.dtype
    axis: int = 0  # along which it is cut into pieces
    pairs: int = 0  # R where the rows of each head are rotary pairs side by side, as Meta's q and k

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def copy_to(self, out: Tensor, files: MappedFiles, axis: int = 0, start: int = 0) -> None:
        """Copy straight from the mapped files to the device and dtype of `out`.

        That may be a part: from `start` on along `axis`, as much as `out` holds. Nothing else is
        copied then. Of rows in pairs only those of whole heads can be had.
        """
        size = self.shape[self.axis] // len(self.files)
        first = start if axis == self.axis else 0  # of the rows (or columns) that `out` holds
        last = first + out.shape[self.axis]
        for number, file in enumerate(self.files):
            low, high = max(first, number * size), min(last, (number + 1) * size)
            if low >= high:
                continue
            part = out.narrow(self.axis, low - first, high - low)
            piece = files.tensor(file, self.name, part.numel() * self.dtype.itemsize)
            piece = piece.narrow(self.axis, low - number * size, high - low)
            if axis != self.axis:
                piece = piece.narrow(axis, start, out.shape[axis])
            if self.pairs:  # row 2r + half of each head goes to row half * R + r
                piece = piece.unflatten(0, (-1, self.pairs, 2)).transpose(1, 2)
                part = part.unflatten(0, (-1, 2, self.pairs))
            part.copy_(piece)
            del piece

    def rows(self) -> "StoredRows | None":
        """To read some of its rows later; None where they do not lie in a file as they are."""
        file = self.files[0]
        if len(self.files) > 1 or file.suffix != ".safetensors" or not hasattr(os, "pread"):
            return None
        with file.open("rb") as opened:  # 8 bytes of length, the header, then all tensors
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        start = 8 + length + header[self.name]["data_offsets"][0]
        return StoredRows(file, start, self.shape[1:], self.dtype)

    def read(self) -> Tensor:
        """The tensor as it is stored: mapped where it is whole, assembled where it is cut."""
        files = MappedFiles(budget=self.nbytes)
        if len(self.files) == 1:
            return files.tensor(self.files[0], self.name, self.nbytes)
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(whole, files)
        return whole


class StoredRows:
    """Rows of a stored tensor, read one by one when they are asked for.

    Read and not mapped: each page of a mapping takes up to half a megabyte around it into the
    memory of this process, and a mapped file that is cut kills it. The file stays open, so it may
    be replaced or removed, but not overwritten.
    """

    def __init__(self, file: Path, start: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.name = file
        self.start = start
        self.shape = shape
        self.dtype = dtype
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __call__(self, ids: Int[Tensor, " n"]) -> Num[Tensor, "n ..."]:
        size = self.shape.numel() * self.dtype.itemsize
        places = [self.start + i * size for i in ids.tolist()]
        data = bytearray().join(os.pread(self._file, size, place) for place in places)
        if len(data) != len(places) * size:
            raise OSError(f"{self.name}: was cut short while its model is in use; load it again")
        if not data:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(-1, *self.shape)


# What the two readers raise on files that were cut or overwritten, as found by damaging some.
DAMAGED = (
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
    """All tensors of a file, mapped into memory: none of their bytes is read yet."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGED as error:
        reason = textwrap.shorten(str(error), 100)
        raise ValueError(
            f"{file}: cannot be read ({type(error).__name__}: {reason}); if it is cut short or "
            "damaged, download it again"
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


def few(names: Collection[str]) -> str:
    """The first names of many, for an error of one line."""
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
