"""Layers that are given the same input as one product: queries, keys and values; gate and up.

The model calls them one after the other, as it should. The first call multiplies for all of them,
and the others take their rows of it. A product of few rows is waiting for memory, and a few large
matrices are read faster than many small ones: 10%, of these products of the 1B on two cores.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama32.adapt.packed import PackedLinear

GROUPS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class Product(nn.Module):
    """The product for all, kept until each has had its rows."""

    def __init__(self, layer: PackedLinear, num_parts: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_parts = num_parts
        self._last: tuple[Tensor, Tensor, int] | None = None  # put and taken as one, for threads

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        last = self._last
        if last is None or last[0] is not x:
            last = x, self.layer(x), self.num_parts
        x, y, left = last
        self._last = (x, y, left - 1) if left > 1 else None
        return y


class Part(nn.Module):
    """A layer as some rows of a product that it shares."""

    def __init__(self, product: Product, start: int, stop: int) -> None:
        super().__init__()
        self.product = product
        self.start, self.stop = start, stop

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return self.product(x)[..., self.start : self.stop]

    def unpacked(self) -> Float[Tensor, "out in"]:
        """Its own part of the weight."""
        return self.product.layer.unpacked()[self.start : self.stop]

    def extra_repr(self) -> str:
        """Which rows."""
        return f"{self.start}:{self.stop}"


def siblings(name: str) -> list[str]:
    """The names of all that are given the same input as the layer of this name, itself among them;
    none where it is alone."""
    parent, _, leaf = name.rpartition(".")
    group = next((group for group in GROUPS if leaf in group), ())
    return [f"{parent}.{sibling}" for sibling in group]


def parts(layer: PackedLinear, sizes: Sequence[int]) -> list[Part]:
    """The layers that were joined, each with so many rows."""
    product = Product(layer, len(sizes))
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return [Part(product, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
