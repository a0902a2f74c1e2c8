"""Whether random things are as random as they should be."""

import math

import torch


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """In standard deviations from what chance gives."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = counts.sum() * probabilities[possible].double()
    freedom = int(possible.sum()) - 1
    distance = ((counts[possible] - expected) ** 2 / expected).sum().item()
    return (distance - freedom) / math.sqrt(2 * freedom)
