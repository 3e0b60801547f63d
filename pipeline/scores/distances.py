"""Squared distances between all items of two sets."""

import torch
from torch import Tensor

ROUNDING = 1e-12  # of a squared distance, over the squared lengths: float64 leaves about 1e-15


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Float64 [M, N] of x, float64 [M, d], and y, float64 [N, d]; exactly 0 between equal items.

    By a product of matrices, which cancels where items are near each other and far from 0: what is
    within its rounding of 0 is made 0, or an item's copies would lie at random distances from it.
    """
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(lengths, x, y.T, alpha=-2)
    return squares.masked_fill_(squares <= ROUNDING * lengths, 0)
