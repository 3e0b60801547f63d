"""Arrow shards: how images are laid out on disk, and how they are read back without copying.

A shard is an uncompressed Arrow IPC file with the columns `image` (`arrow.fixed_shape_tensor`,
uint8 [C, H, W]), `label` (int64, null where there is none) and `source` (shard and member the
image came from). Equal rows give equal bytes. Plain pyarrow reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class ImageRow:
    """One image as it is stored."""

    image: np.ndarray  # uint8 [C, H, W]
    label: int | None
    source: str


def write_arrow(rows: Sequence[ImageRow], shape: tuple[int, int, int]) -> bytes:
    """The content of a shard with these rows; `shape` is [C, H, W] of every image."""
    tensor_type = pa.fixed_shape_tensor(pa.uint8(), shape)
    if rows:
        pixels = np.ascontiguousarray(np.stack([row.image for row in rows]))
        images = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    else:
        images = pa.array([], type=tensor_type)
    batch = pa.record_batch(
        {
            "image": images.cast(tensor_type),
            "label": pa.array([row.label for row in rows], type=pa.int64()),
            "source": pa.array([row.source for row in rows], type=pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


class ArrowImages:
    """The images of several shards as one sequence, memory-mapped and indexed at random.

    Args:
        paths: local shard files; sample ids count through them in this order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._pixels: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for path in paths:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            if table.num_rows == 0:
                continue
            self._pixels.append(table["image"].chunk(0).to_numpy_ndarray())
            label = table["label"].fill_null(-1)
            labels.append(label.to_numpy())
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)  # -1: none
        self._ends = np.cumsum([len(p) for p in self._pixels], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of every image."""
        return self._pixels[0].shape[1:]

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The images with these sample ids, uint8 [len(ids), C, H, W], a copy."""
        out = np.empty((len(ids), *self.shape), np.uint8)
        shards = np.searchsorted(self._ends, ids, side="right")
        for shard in np.unique(shards):
            here = shards == shard
            first = self._ends[shard - 1] if shard else 0
            out[here] = self._pixels[shard][ids[here] - first]
        return out
