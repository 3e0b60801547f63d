"""Samples that are broken in themselves: of one colour, or black.

Those that are not made of numbers have no score at all: who draws them refuses them.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DegenerateCounts:
    """How many of the samples are broken; counts of parts add up. An item may count in several."""

    count: int  # of all samples
    constant: int  # every channel has one value throughout
    black: int  # of these, those of zeros alone; always 0 for sequences, whose silence is constant

    def __add__(self, other: "DegenerateCounts") -> "DegenerateCounts":
        return DegenerateCounts(
            self.count + other.count,
            self.constant + other.constant,
            self.black + other.black,
        )


def count_degenerate(items: np.ndarray) -> DegenerateCounts:
    """The counts of images, uint8 [N, C, H, W], or of sequences, float32 [N, C, L]."""
    flat = items.reshape(*items.shape[:2], -1)
    is_constant = (flat.max(2) == flat.min(2)).all(1)
    is_black = ~flat.any((1, 2)) if items.dtype == np.uint8 else np.zeros(len(items), bool)
    return DegenerateCounts(len(items), int(is_constant.sum()), int(is_black.sum()))
