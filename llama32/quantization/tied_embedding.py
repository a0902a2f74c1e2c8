"""Tied embeddings after `lm_head` is quantized or packed.

An embedding can read the rows of a quantized head, but not of a head in a library's packed form. A
second copy in memory would cost a fifth of Llama 3.2 1B, so next to a packed head the embedding
reads rows from the checkpoint file, a few KB for each token.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama32.model import Llama
from llama32.quantization.quantized_linear import QuantizedLinear


class QuantizedEmbedding(nn.Module):
    """An embedding that reads the rows of a quantized layer."""

    like: Tensor  # empty; a cast of the model changes this dtype, the dtype of the output

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B E"]:
        rows = self.layer.slice_rows(tokens.flatten()).dequantized()
        return rows.type_as(self.like).view(*tokens.shape, -1)


ReadRows = Callable[[Int[Tensor, " n"]], Tensor]  # reads rows of a stored tensor by index


class StoredEmbedding(nn.Module):
    """An embedding that reads rows from a file.

    `to_vectors` makes embedding vectors from the rows of all `readers`, one per stored tensor.
    """

    def __init__(
        self, readers: Sequence[ReadRows], to_vectors: Callable[..., Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.readers = readers
        self.to_vectors = to_vectors
        self.dtype = dtype

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B E"]:
        rows = (read(tokens.flatten()) for read in self.readers)
        return self.to_vectors(*rows).to(self.dtype).view(*tokens.shape, -1)


def linear_layer_names(model: Llama) -> list[str]:
    """Return the names of all linear layers, `lm_head` first: a tied embedding follows the head."""
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear or isinstance(module, QuantizedLinear)
        if not name.startswith("embed")
    ]
    return sorted(names, key=lambda name: name != "lm_head")


def is_tied(model: Llama) -> bool:
    """True if the embedding and the head are one matrix."""
    if isinstance(model.embed, QuantizedEmbedding):
        return model.embed.layer is model.lm_head
    embed, head = model.embed, model.lm_head
    return isinstance(embed, nn.Embedding) and getattr(head, "weight", None) is embed.weight
