"""The KV cache: pages of keys and values that all sequences share.

A sequence is a list of page ids. It grows by taking another page and never moves, so nothing is
copied when it does, and sequences of any length fit into one pool without gaps. A contiguous
cache is the same thing with one page. (PagedAttention, Kwon et al. 2023)
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama32.batch import Batch
from llama32.config import LlamaConfig
from llama32.flash import LONGEST_PAGE, fastest
from llama32.paged import PagedAttend

PAGE_SIZE = LONGEST_PAGE  # slots


class PagedCache:
    """A pool of P pages of C slots, for every layer, and a list of those not in use.

    `attend` is how its pages are read, the fastest form for the device unless given.
    """

    keys: Float[Tensor, "L P C K D"]
    values: Float[Tensor, "L P C K D"]

    def __init__(
        self,
        config: LlamaConfig,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attend: PagedAttend | None = None,
    ) -> None:
        slots = config.num_hidden_layers, num_pages, page_size
        shape = (*slots, config.num_key_value_heads, config.head_dim)
        self._allocate(shape, dtype, torch.device(device))
        self.page_size = page_size
        self.free = list(reversed(range(num_pages)))  # taken from the end: lowest page first
        device = self.keys.device
        self.attend = attend or fastest(device, dtype, config.head_dim, page_size)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, not empty: a kernel that reads a whole page multiplies its unused slots by 0.
        self.keys = zeros(shape, dtype, device)
        self.values = zeros(shape, dtype, device)

    def grow(self, pages: list[int], length: int) -> None:
        """Append free pages until there is room for `length` tokens."""
        missing = -(-length // self.page_size) - len(pages)
        if missing > len(self.free):
            raise MemoryError(
                f"the KV cache has {len(self.free)} free pages of {self.page_size} tokens, and "
                f"{missing} are needed for a sequence of {length}; make it larger"
            )
        pages.extend(self.free.pop() for _ in range(missing))

    def release(self, pages: list[int]) -> None:
        """Give back a sequence's pages; their content is forgotten."""
        self.free.extend(reversed(pages))
        pages.clear()

    def attends(self, batch: Batch) -> Sequence[Any]:
        """One attention for each layer, all reading and writing the same slots."""
        layers = zip(self.keys, self.values, strict=True)
        return [CachedAttention(keys, values, batch, self.attend) for keys, values in layers]


def bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """What one token takes in the cache: a key and a value in every layer."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * dtype.itemsize


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU straight from the system, which hands out zeros and no memory before it is written:
    a large cache then costs what is used of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    try:
        fresh = mmap.mmap(-1, size)
    except (OSError, OverflowError):
        raise MemoryError(
            f"a KV cache of {2 * size:,} bytes is more than this machine has; make it smaller"
        ) from None
    return torch.frombuffer(fresh, dtype=dtype).view(shape)


@dataclass
class CachedAttention:
    """Attention of one layer that remembers: new keys and values are written, then all read."""

    keys: Float[Tensor, "P C K D"]
    values: Float[Tensor, "P C K D"]
    batch: Batch
    attend: PagedAttend

    def __call__(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N H D"]:
        self.keys.flatten(0, 1).index_copy_(0, self.batch.slots, k)
        self.values.flatten(0, 1).index_copy_(0, self.batch.slots, v)
        return self.attend(q, self.keys, self.values, self.batch)
