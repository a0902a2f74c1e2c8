"""The KV cache in a byte for each number: half the memory of bf16, for longer or more contexts.

Every token has a scale for each of its heads, so how it is rounded depends on no other token, and
a page can be shared and read as ever. It is read by turning the pages of a step back into floats,
layer by layer, or in decoding on a CPU a few pages after the other: memory is what this saves, and
not time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from llama32.batch import Batch, Span
from llama32.cache import PagedCache, zeros
from llama32.config import LlamaConfig
from llama32.paged import fused, join

PIECE = 1024  # slots that are read at a time in decoding: as floats they stay in a cache


class Int8Cache(PagedCache):
    """Pages of int8 keys and values, and their scales; `dtype` is what attention computes in."""

    keys: Int8[Tensor, "L P C K D"]
    values: Int8[Tensor, "L P C K D"]
    key_scales: Float[Tensor, "L P C K"]
    value_scales: Float[Tensor, "L P C K"]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super()._allocate(shape, torch.int8, device)
        self.dtype = dtype
        self.key_scales = zeros(shape[:-1], torch.float32, device)
        self.value_scales = zeros(shape[:-1], torch.float32, device)

    def attends(self, batch: Batch) -> list["Int8Attention"]:
        """One attention for each layer. All read the same pages, which lie in a row for them."""
        pieces = whole = None
        if batch.max_query == 1 and self.attend is fused:
            pieces = [in_pieces(span, self.page_size) for span in batch.spans]
        else:
            whole = in_a_row(batch)
        pools = zip(self.keys, self.key_scales, self.values, self.value_scales, strict=True)
        return [
            Int8Attention(
                Pool(keys, key_scales),
                Pool(values, value_scales),
                batch,
                pieces,
                whole,
                self,
            )
            for keys, key_scales, values, value_scales in pools
        ]


def int8_bytes_per_token(config: LlamaConfig) -> int:
    """What one token takes in it: a byte for each number, four for the scale of each head."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * (config.head_dim + 4)


@dataclass
class Pool:
    """The keys or the values of one layer."""

    integers: Int8[Tensor, "P C K D"]
    scales: Float[Tensor, "P C K"]

    def write(self, slots: Int[Tensor, " N"], x: Float[Tensor, "N K D"]) -> None:
        """Round to 127 steps to either side of each head's largest number."""
        wide = x.float()
        scales = wide.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        integers = (wide / scales.unsqueeze(-1)).round_().to(torch.int8)
        self.integers.flatten(0, 1).index_copy_(0, slots, integers)
        self.scales.flatten(0, 1).index_copy_(0, slots, scales)

    def read(self, pages: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n C K D"]:
        """Some pages as floats."""
        return (self.integers[pages] * self.scales[pages].unsqueeze(-1)).to(dtype)


@dataclass
class Int8Attention:
    """Attention of one layer that remembers: new keys and values are rounded and written, then
    all that the batch needs are read."""

    keys: Pool
    values: Pool
    batch: Batch
    pieces: Sequence["Pieces"] | None  # of each sequence, in decoding on a CPU
    whole: tuple[Int[Tensor, " n"], Batch] | None  # else: as `in_a_row` has them
    cache: Int8Cache

    def __call__(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N H D"]:
        self.keys.write(self.batch.slots, k)
        self.values.write(self.batch.slots, v)
        if self.pieces is not None:
            queries = q[: len(self.pieces)].unbind()
            return join([*map(self.one_query, queries, self.pieces)], q)
        assert self.whole is not None
        pages, compact = self.whole
        k, v = (pool.read(pages, self.cache.dtype) for pool in (self.keys, self.values))
        return self.cache.attend(q, k, v, compact)

    def one_query(self, q: Float[Tensor, "H D"], pieces: "Pieces") -> Float[Tensor, "1 H D"]:
        """Piece after piece of the context, each weighted by its sum of exponentials.

        (FlashDecoding, Dao et al. 2023)
        """
        grouped = q.view(1, self.keys.integers.shape[-2], -1, q.shape[-1])  # (1, K, H/K, D)
        outs, sizes = [], []
        for pages, length in pieces:
            k, v = (
                pool.read(pages, self.cache.dtype).flatten(0, 1)[:length].transpose(0, 1)[None]
                for pool in (self.keys, self.values)
            )
            out, size = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, k, v)
            outs.append(out)
            sizes.append(size)
        if len(outs) == 1:
            return outs[0].reshape(1, *q.shape)
        weights = torch.stack(sizes).softmax(0).unsqueeze(-1)  # (pieces, 1, K, H/K, 1)
        return (torch.stack(outs) * weights).sum(0).type_as(q).view(1, *q.shape)


Pieces = Sequence[tuple[Int[Tensor, " n"], int]]  # pages, and how many of their slots are used


def in_pieces(span: Span, page_size: int) -> Pieces:
    """The pages of a sequence, up to PIECE slots at a time from its beginning."""
    used, step = span.pages[: -(-span.length // page_size)], max(PIECE // page_size, 1)
    return [
        (torch.tensor(used[i : i + step]), min(span.length - i * page_size, step * page_size))
        for i in range(0, len(used), step)
    ]


def in_a_row(batch: Batch) -> tuple[Int[Tensor, " n"], Batch]:
    """The pages that a batch reads, one sequence after the other, and the same batch over a pool
    that holds just these."""
    pages: list[int] = []
    spans = []
    for span in batch.spans:
        used = span.pages[: -(-span.length // batch.page_size)]
        spans.append(span._replace(pages=[*range(len(pages), len(pages) + len(used))]))
        pages += used
    device = batch.tokens.device
    rows = len(batch.tokens)
    compact = Batch.pack(spans, batch.page_size, device, rows=rows)
    compact = replace(compact, max_query=batch.max_query)
    return torch.tensor(pages, device=device), compact
