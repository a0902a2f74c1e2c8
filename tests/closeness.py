"""Closeness relative to magnitude, so that a bound holds on any processor.

Processors sum in different orders, and a rounding error grows with the numbers that are summed. An
absolute bound that holds on one processor and one model fails on others.
"""

import torch
from torch import Tensor


def assert_near(found: Tensor, expected: Tensor, within: float) -> None:
    """Fail unless every difference is at most `within` times the largest expected magnitude."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    found, expected = found.detach().double(), expected.detach().double()
    largest = float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, atol=within * largest, rtol=0)
