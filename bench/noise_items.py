"""Items to train on where the data does not matter."""

from typing import Any

import numpy as np


class NoiseItems:
    """Images of noise, in memory.

    Args:
        shape: of one, [C, H, W].
        count: of them.
    """

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.counts = shape, (count,)
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        return self.pixels[ids]

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        return np.full(len(ids), -1)

    def prefetch(self, uses: Any) -> None: ...

    def close(self) -> None: ...
