"""The head and the embedding when they are one matrix, and one of them takes another form.

Its rows are the embeddings; a product with all of them is the head. It is a fifth of Llama 3.2 1B,
so it is kept once.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama32.adapt.packed import PackedLinear
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
        return torch.cat([block(x) for block in self.blocks], dim=-1)

    def unpacked(self, i: int) -> Float[Tensor, "rows E"]:
        """The rows of a block."""
        block = self.blocks[i]
        assert isinstance(block, PackedLinear)
        return block.unpacked()


class PackedEmbedding(nn.Module):
    """Looks vectors up in a packed head, by unpacking the blocks that hold them."""

    def __init__(self, head: PackedHead, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = head
        self.dtype = dtype
        self._unpacked: OrderedDict[int, Float[Tensor, "rows E"]] = OrderedDict()  # by last use

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B E"]:
        rows = [self._block(id // BLOCK)[id % BLOCK] for id in tokens.flatten().tolist()]
        return torch.stack(rows).view(*tokens.shape, -1)

    def _block(self, i: int) -> Float[Tensor, "rows E"]:
        if i not in self._unpacked:
            self._unpacked[i] = self.head.unpacked(i).to(self.dtype)
        self._unpacked.move_to_end(i)
        if len(self._unpacked) > BLOCKS_KEPT:
            self._unpacked.popitem(last=False)
        return self._unpacked[i]


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
