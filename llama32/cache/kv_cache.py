"""The KV cache: pages of keys and values, shared by all sequences.

A sequence is a list of page ids. A sequence grows by appending pages and never moves, so growth
copies nothing, and sequences of any length share one pool without fragmentation. A contiguous cache
is the special case of one page per sequence. (PagedAttention, Kwon et al. 2023)
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama32.cache.batch import Batch
from llama32.cache.flash_attention import MAX_PAGE_SIZE, select_backend
from llama32.cache.paged_attention import PackedQueries, PagedAttend, PagePool
from llama32.config import LlamaConfig

PAGE_SIZE = MAX_PAGE_SIZE  # in slots; a slot holds the key and value of one token


class PagedCache:
    """A pool of P pages with C slots in every layer, and the list of free pages.

    `attend` computes attention over the pages; the default is the fastest backend for the device.
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
        self.free_pages = list(reversed(range(num_pages)))  # popped from the end: lowest id first
        device = self.keys.device
        self.attend = attend or select_backend(device, dtype, config.head_dim, page_size)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros: kernels that read whole pages multiply unused slots by 0, and 0 * nan is nan.
        self.keys = allocate_zeros(shape, dtype, device)
        self.values = allocate_zeros(shape, dtype, device)

    def grow(self, pages: list[int], length: int) -> None:
        """Append free pages until `length` tokens fit. Raises MemoryError if too few are free."""
        missing = -(-length // self.page_size) - len(pages)
        if missing > len(self.free_pages):
            raise MemoryError(
                f"the KV cache has {len(self.free_pages)} free pages of {self.page_size} tokens, "
                f"and {missing} are needed for a sequence of {length} tokens; make the cache larger"
            )
        pages.extend(self.free_pages.pop() for _ in range(missing))

    def release(self, pages: list[int]) -> None:
        """Return the pages of a sequence to the free list and clear `pages`."""
        self.free_pages.extend(reversed(pages))
        pages.clear()

    def attention_fns(self, batch: Batch) -> Sequence[Any]:
        """Return one attention function per layer; all layers use the same slot numbers."""
        layers = zip(self.keys, self.values, strict=True)
        return [CachedAttention(keys, values, batch, self.attend) for keys, values in layers]


def bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token in the cache: a key and a value in every layer."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * dtype.itemsize


def allocate_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros; on a CPU as an anonymous memory map.

    A memory map takes memory only where written to, so a large cache costs only the memory in use.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    try:
        buffer = mmap.mmap(-1, size)
    except (OSError, OverflowError):
        raise MemoryError(
            f"a KV cache of {2 * size:,} bytes needs more memory than this machine has; "
            "make it smaller"
        ) from None
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


@dataclass
class CachedAttention:
    """The attention of one layer: writes new keys and values, then attends over the cache."""

    keys: PagePool
    values: PagePool
    batch: Batch
    attend: PagedAttend

    def __call__(
        self, q: PackedQueries, k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> PackedQueries:
        self.keys.flatten(0, 1).index_copy_(0, self.batch.slots, k)
        self.values.flatten(0, 1).index_copy_(0, self.batch.slots, v)
        return self.attend(q, self.keys, self.values, self.batch)
