"""The KV cache in one byte per number: half the memory of bf16, for longer or more contexts.

Every token has a scale per head, so the rounding of a token depends on no other token, and pages
are shared as usual. To read, the pages of a step are converted back to floats, layer by layer; in
decode on a CPU a few pages at a time. The cache saves memory, not time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from llama32.cache.batch import Batch, Span
from llama32.cache.kv_cache import PagedCache, allocate_zeros
from llama32.cache.paged_attention import PackedQueries, concat_and_pad, sdpa_per_sequence
from llama32.config import LlamaConfig

CHUNK_SLOTS = 1024  # slots per read in decode: as floats they fit into a processor's cache

PageChunks = Sequence[tuple[Int[Tensor, " _"], int]]  # page ids, and the number of used slots


class Int8Cache(PagedCache):
    """Pages of int8 keys and values with scales; attention computes in `dtype`."""

    keys: Int8[Tensor, "L P C K D"]
    values: Int8[Tensor, "L P C K D"]
    key_scales: Float[Tensor, "L P C K"]
    value_scales: Float[Tensor, "L P C K"]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super()._allocate(shape, torch.int8, device)
        self.dtype = dtype
        self.key_scales = allocate_zeros(shape[:-1], torch.float32, device)
        self.value_scales = allocate_zeros(shape[:-1], torch.float32, device)

    def attention_fns(self, batch: Batch) -> list["Int8Attention"]:
        """Return one attention per layer; all layers read the same pages."""
        chunks = compacted = None
        if batch.max_query == 1 and self.attend is sdpa_per_sequence:
            chunks = [page_chunks(span, self.page_size) for span in batch.spans]
        else:
            compacted = compact(batch)
        keys = map(QuantizedPool, self.keys, self.key_scales)
        values = map(QuantizedPool, self.values, self.value_scales)
        return [
            Int8Attention(*pools, batch, chunks, compacted, self)
            for pools in zip(keys, values, strict=True)
        ]


def int8_bytes_per_token(config: LlamaConfig) -> int:
    """Return the bytes of one token in the cache: one per number, four per head for the scale."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * (config.head_dim + 4)


@dataclass
class QuantizedPool:
    """The keys or the values of one layer."""

    integers: Int8[Tensor, "P C K D"]
    scales: Float[Tensor, "P C K"]

    def write(self, slots: Int[Tensor, " N"], x: Float[Tensor, "N K D"]) -> None:
        """Round to 127 steps on either side of zero, up to each head's largest number."""
        upcast = x.float()
        scales = upcast.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        integers = (upcast / scales.unsqueeze(-1)).round_().to(torch.int8)
        self.integers.flatten(0, 1).index_copy_(0, slots, integers)
        self.scales.flatten(0, 1).index_copy_(0, slots, scales)

    def read(self, pages: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n C K D"]:
        """Convert pages to floats."""
        return (self.integers[pages] * self.scales[pages].unsqueeze(-1)).to(dtype)


@dataclass
class Int8Attention:
    """The attention of one layer: quantizes and writes new keys and values, then attends."""

    keys: QuantizedPool
    values: QuantizedPool
    batch: Batch
    chunks: Sequence[PageChunks] | None  # of each sequence, for decode on a CPU
    compacted: tuple[Int[Tensor, " n"], Batch] | None  # the result of `compact` otherwise
    cache: Int8Cache

    def __call__(
        self, q: PackedQueries, k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> PackedQueries:
        self.keys.write(self.batch.slots, k)
        self.values.write(self.batch.slots, v)
        if self.chunks is not None:
            queries = q[: len(self.chunks)].unbind()
            return concat_and_pad([*map(self.decode, queries, self.chunks)], q)
        assert self.compacted is not None
        pages, compacted_batch = self.compacted
        k, v = (pool.read(pages, self.cache.dtype) for pool in (self.keys, self.values))
        return self.cache.attend(q, k, v, compacted_batch)

    def decode(self, q: Float[Tensor, "H D"], chunks: PageChunks) -> Float[Tensor, "1 H D"]:
        """Attend to one chunk of the context after the other, then merge by log-sum-exp.

        (FlashDecoding, Dao et al. 2023)
        """
        grouped = q.view(1, self.keys.integers.shape[-2], -1, q.shape[-1])  # (1, K, H/K, D)
        parts, lses = [], []
        for pages, length in chunks:
            k, v = (
                pool.read(pages, self.cache.dtype).flatten(0, 1)[:length].transpose(0, 1)[None]
                for pool in (self.keys, self.values)
            )
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, k, v)
            parts.append(part)
            lses.append(lse)
        if len(parts) == 1:
            return parts[0].reshape(1, *q.shape)
        weights = torch.stack(lses).softmax(0).unsqueeze(-1)  # (chunks, 1, K, H/K, 1)
        return (torch.stack(parts) * weights).sum(0).type_as(q).view(1, *q.shape)


def page_chunks(span: Span, page_size: int) -> PageChunks:
    """Split the pages of a sequence into chunks of up to CHUNK_SLOTS slots."""
    pages, step = span.used_pages(page_size), max(CHUNK_SLOTS // page_size, 1)
    return [
        (torch.tensor(pages[i : i + step]), min(span.length - i * page_size, step * page_size))
        for i in range(0, len(pages), step)
    ]


def compact(batch: Batch) -> tuple[Int[Tensor, " n"], Batch]:
    """Return the pages of a batch in sequence order, and the batch over a pool of these pages."""
    pages: list[int] = []
    spans = []
    for span in batch.spans:
        used = span.used_pages(batch.page_size)
        spans.append(span._replace(pages=[*range(len(pages), len(pages) + len(used))]))
        pages += used
    device = batch.tokens.device
    compacted = Batch.pack(spans, batch.page_size, device, num_rows=len(batch.tokens))
    compacted = replace(compacted, max_query=batch.max_query)
    return torch.tensor(pages, device=device), compacted
