"""The samples gone through once, a chunk at a time: what is kept of them, and counted.

All of them become Arrow files if they are to be kept; a few are shown, and compared with the
training images.
"""

from dataclasses import dataclass, field

import numpy as np

from pipeline.drawing import Series, iter_chunks
from pipeline.scores.degenerate import DegenerateCounts, count_degenerate
from pipeline.shards import write_arrow
from pipeline.workflow import StepContext

SHOWN = 64  # samples in the grid
LOOKED_AT = 2048  # that are compared with all training images
OF_A_CLASS, CLASSES_SHOWN = 8, 10
FILE_BYTES = 1 << 25  # of an Arrow file of samples


@dataclass
class Gallery:
    """What was kept of the samples."""

    degenerate: DegenerateCounts
    first: np.ndarray  # a grid of them, as they are stored
    spread: np.ndarray  # up to 2048 over all of them, which may come sorted
    numbers: tuple[int, ...]  # of these
    by_class: dict[int, np.ndarray] = field(default_factory=dict)  # a few of each class


def look_through(context: StepContext, series: Series) -> Gallery:
    """Counts broken samples, keeps some, and writes all as artifacts `samples-00000.arrow`, ...

    With `evaluate.keep_samples = false` nothing is written.
    """
    counts: DegenerateCounts | None = None
    first: list[np.ndarray] = []
    spread: list[np.ndarray] = []
    numbers = spread_evenly(series.num_samples, LOOKED_AT)
    chosen, start = np.array(numbers), 0
    by_class: dict[int, list[np.ndarray]] = {}
    writer = _Writer(context) if context.config.evaluate.keep_samples else None
    for chunk in iter_chunks(context, series):
        items, labels = chunk["items"], chunk.get("labels")
        found = count_degenerate(items)
        counts = found if counts is None else counts + found
        if start < SHOWN:
            first.append(items)
        spread.append(items[chosen[(chosen >= start) & (chosen < start + len(items))] - start])
        start += len(items)
        for label, item in zip(labels.tolist(), items, strict=True) if labels is not None else ():
            if label < CLASSES_SHOWN and len(few := by_class.setdefault(label, [])) < OF_A_CLASS:
                few.append(item)
        if writer is not None:
            writer.add(items, labels)
    if writer is not None:
        writer.close()
    assert counts is not None
    shown = {label: np.stack(by_class[label]) for label in sorted(by_class)}
    grid = np.concatenate(first)[:SHOWN]
    return Gallery(counts, grid, np.concatenate(spread), tuple(numbers), shown)


def spread_evenly(count: int, at_most: int) -> list[int]:
    """Numbers below `count`, as far apart as can be."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


class _Writer:
    """Writes samples as Arrow files of a target size."""

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._items: list[np.ndarray] = []
        self._labels: list[int | None] = []
        self._number = self._first = 0

    def add(self, items: np.ndarray, labels: np.ndarray | None) -> None:
        """Takes a chunk, in the order of the numbers."""
        self._items.append(items)
        self._labels += [None] * len(items) if labels is None else labels.tolist()
        if sum(part.nbytes for part in self._items) >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Writes what is collected."""
        if not self._items:
            return
        items = np.concatenate(self._items)
        names = [f"sample {self._first + k}" for k in range(len(items))]
        content = write_arrow(items, self._labels, names)
        self._context.write_artifact(f"samples-{self._number:05d}.arrow", content)
        self._items, self._labels = [], []
        self._number, self._first = self._number + 1, self._first + len(items)
