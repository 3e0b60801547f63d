"""Precision and recall: are samples like real images, and are all real images like samples?"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.scores.distances import squared_distances

NEIGHBOUR = 3  # whose distance is an item's radius
BLOCK = 2048  # rows of the matrix of distances that are held in memory at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of samples in the real manifold, and of real images in that of the samples."""

    precision: float
    recall: float
    count: int  # of each side, for both depend on it


def precision_recall(
    real: np.ndarray, generated: np.ndarray, max_items: int = 10_000, seed: int = 0
) -> PrecisionRecall | None:
    """By balls around each item that reach to its third nearest neighbour; None for fewer than 10.

    As many of each side are drawn, for a larger set has smaller balls.

    Args:
        real: features [M, d], in any order.
        generated: features [N, d], in any order.
        max_items: of each side; the cost is its square.
        seed: of the draw.

    Reference: Kynkaanniemi et al. (1904.06991), eqs. 1 and 2.
    """
    count = min(len(real), len(generated), max_items)
    if count < 10:
        return None
    rng = np.random.Generator(np.random.Philox(key=seed))
    a, b = (
        torch.from_numpy(x[rng.permutation(len(x))[:count]].astype(np.float64))
        for x in (real, generated)
    )
    origin = a.mean(0)  # far from 0 the squared distances would cancel
    a, b = a - origin, b - origin
    return PrecisionRecall(_share_inside(b, a), _share_inside(a, b), count)


def _share_inside(items: Tensor, of: Tensor) -> float:
    """The share of items that lie in a ball around one of the others, its surface counted in."""
    radii = []
    for start in range(0, len(of), BLOCK):
        squares = squared_distances(of[start : start + BLOCK], of)
        rows = torch.arange(len(squares))
        squares[rows, rows + start] = torch.inf  # nothing is its own neighbour
        radii.append(squares.kthvalue(NEIGHBOUR, dim=1).values)
    reach = torch.cat(radii)
    inside = [(squared_distances(x, of) <= reach).any(1) for x in items.split(BLOCK)]
    return float(torch.cat(inside).double().mean())
