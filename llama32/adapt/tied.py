"""The head and the embedding when they are one matrix, and the head takes another form.

A quantized head can still be looked up in, row by row. What a library has packed cannot. A fifth of
Llama 3.2 1B is not kept twice for that: the embedding then reads its rows from the file, a few KB
for each token.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama32.adapt.quantized import QuantizedLinear
from llama32.model import Llama


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


Rows = Callable[[Int[Tensor, " n"]], Tensor]  # those of a tensor that is not in memory


class StoredEmbedding(nn.Module):
    """Looks vectors up where they are stored: `vectors` makes them of the rows that were read."""

    def __init__(
        self, parts: Sequence[Rows], vectors: Callable[..., Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = parts
        self.vectors = vectors
        self.dtype = dtype

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B E"]:
        rows = (part(tokens.flatten()) for part in self.parts)
        return self.vectors(*rows).to(self.dtype).view(*tokens.shape, -1)


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
    embed, head = model.embed, model.lm_head
    return isinstance(embed, nn.Embedding) and getattr(head, "weight", None) is embed.weight
