"""The head and the embedding when they are one matrix, and one of them takes another form.

Its rows are the embeddings; a product with all of them is the head. It is a fifth of Llama 3.2 1B,
so it is kept once.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama32.adapt.packed import PackedLinear, refuse_gradient
from llama32.adapt.quantized import QuantizedLinear
from llama32.model import Llama

BLOCK = 2048  # rows that are packed together, and unpacked together
BLOCKS_KEPT = 16  # of them unpacked: most of a text is of few words


class QuantizedEmbedding(nn.Module):
    """Looks vectors up in the rows of a quantized layer."""

    like: Tensor  # of the dtype that they come in

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B E"]:
        rows = self.layer.rows(tokens.flatten()).dequantized()
        return rows.type_as(self.like).view(*tokens.shape, -1)


class PackedHead(nn.Module):
    """A head in blocks of rows, each packed for itself, so that each can be unpacked alone."""

    def __init__(self, blocks: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B V"]:
        refuse_gradient(x)
        prepared = self.block(0).prepare(x)
        return torch.cat([self.block(i).multiply(prepared) for i in range(len(self.blocks))], -1)

    def block(self, i: int) -> PackedLinear:
        """One of them."""
        block = self.blocks[i]
        assert isinstance(block, PackedLinear)
        return block


class PackedEmbedding(nn.Module):
    """Looks vectors up in a packed head, by unpacking the blocks that hold them."""

    def __init__(self, head: PackedHead, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = head
        self.dtype = dtype
        self._unpacked: OrderedDict[int, Tensor] = OrderedDict()  # the latest last

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B E"]:
        ids, order = tokens.flatten().sort()
        numbers, counts = (ids // BLOCK).unique_consecutive(return_counts=True)
        rows = [
            self._rows(number, its_ids - number * BLOCK)
            for number, its_ids in zip(numbers.tolist(), ids.split(counts.tolist()), strict=True)
        ]
        found = torch.empty(len(ids), *rows[0].shape[1:], dtype=self.dtype)
        return found.index_copy_(0, order, torch.cat(rows).to(self.dtype)).view(*tokens.shape, -1)

    def _rows(self, i: int, places: Int[Tensor, " n"]) -> Float[Tensor, "n E"]:
        """Some of a block."""
        block = self.head.block(i)
        if i not in self._unpacked:
            self._unpacked[i] = block.row_major()
        self._unpacked.move_to_end(i)
        if len(self._unpacked) > BLOCKS_KEPT:
            self._unpacked.popitem(last=False)
        return block.floats(self._unpacked[i][places], places)


def linear_layers(model: Llama) -> list[str]:
    """The names of all that can be replaced, the largest first: the head, whose form an embedding
    that is tied to it follows."""
    found = [
        name
        for name, part in model.named_modules(remove_duplicate=False)
        if type(part) is nn.Linear or isinstance(part, QuantizedLinear)
        if not name.startswith("embed")
    ]
    return sorted(found, key=lambda name: name != "lm_head")


def is_tied(model: Llama) -> bool:
    """Whether the embedding reads the rows of the head."""
    if isinstance(model.embed, QuantizedEmbedding):
        return model.embed.layer is model.lm_head
    return isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is model.embed.weight
