"""Arrow shards: how items are laid out on disk, and how they are read back without copying.

A shard is an uncompressed Arrow IPC file of one record batch with the columns `image`
(`arrow.fixed_shape_tensor`, uint8 [C, H, W]) or `sequence` (float32 [C, L]), `label` (int64 for
numbers, a dictionary of strings for class names, null where there is none) and `source` (shard
and member that the item came from). Equal rows give equal bytes. Plain pyarrow reads it.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.readers.entries import Label

FEW_SHARDS = 16  # up to so many a batch are gathered shard by shard, more item by item


def write_arrow(
    items: np.ndarray, labels: Sequence[Label], sources: Sequence[str]
) -> list[memoryview]:
    """The content of a shard, as parts that share the memory of the items.

    Args:
        items: uint8 [N, C, H, W] or float32 [N, C, L].
        labels: of each item; one class name makes all of them names.
        sources: where each came from.
    """
    batch = pa.record_batch(
        {
            "image" if items.dtype == np.uint8 else "sequence": tensor_column(items),
            "label": _label_column(labels),
            "source": pa.array(sources, type=pa.string()),
        }
    )
    return serialise(batch)


def tensor_column(items: np.ndarray) -> pa.Array:
    """An array [N, ...] as N tensors, without copying."""
    tensor_type = pa.fixed_shape_tensor(pa.from_numpy_dtype(items.dtype), items.shape[1:])
    if not len(items):
        return pa.array([], type=tensor_type)
    items = np.ascontiguousarray(items)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(items).cast(tensor_type)


def serialise(batch: pa.RecordBatch) -> list[memoryview]:
    """The content of an Arrow IPC file with a record batch, as parts that share its memory."""
    parts = _Parts()
    with pa.ipc.new_file(pa.PythonFile(parts, mode="w"), batch.schema) as writer:
        writer.write_batch(batch)
    return parts.parts


class _Parts(io.RawIOBase):
    """A file that keeps what is written to it, without copying."""

    def __init__(self) -> None:
        self.parts: list[memoryview] = []

    def writable(self) -> bool:
        return True

    def write(self, part: Any, /) -> int:
        view = memoryview(part)
        self.parts.append(view)
        return view.nbytes


def _label_column(labels: Sequence[Label]) -> pa.Array:
    if not any(isinstance(label, str) for label in labels):
        return pa.array(labels, type=pa.int64())
    names = [None if label is None else str(label) for label in labels]
    classes = sorted({name for name in names if name is not None})
    codes = {name: code for code, name in enumerate(classes)}
    indices = pa.array([None if n is None else codes[n] for n in names], type=pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(classes, type=pa.string()))


@dataclass(frozen=True)
class ArrowFile:
    """A local shard file; rows that are `excluded` are not seen by readers."""

    path: Path
    excluded: Sequence[int] = ()


class ArrowItems:
    """The items of several shards as one sequence, memory-mapped and indexed at random.

    Args:
        files: item ids count through them in this order.
        classes: class names by their id; None where labels are numbers.
    """

    def __init__(self, files: Sequence[ArrowFile], classes: Sequence[str] | None = None) -> None:
        self._arrays: list[np.ndarray] = []
        self._rows: list[np.ndarray | None] = []  # those seen, where not all are
        labels: list[np.ndarray] = []
        counts: list[int] = []
        ids = None if classes is None else {name: id_ for id_, name in enumerate(classes)}
        for file in files:
            table = pa.ipc.open_file(pa.memory_map(str(file.path))).read_all()
            rows = None
            if file.excluded:
                rows = np.delete(np.arange(table.num_rows), file.excluded)
            if table.num_rows == 0 or (rows is not None and not len(rows)):
                continue
            self._arrays.append(table.column(0).chunk(0).to_numpy_ndarray())
            self._rows.append(rows)
            found = _label_ids(table.column("label").chunk(0), ids)
            labels.append(found if rows is None else found[rows])
            counts.append(len(labels[-1]))
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)  # -1: none
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - np.array(counts, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of every image, or [C, L] of every sequence."""
        return self._arrays[0].shape[1:]

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The items with these ids, uint8 or float32 [len(ids), *shape], a copy."""
        out = np.empty((len(ids), *self.shape), self._arrays[0].dtype)
        shards = np.searchsorted(self._ends, ids, side="right")
        rows = ids - self._starts[shards]
        present = np.unique(shards)
        for shard in present:
            seen = self._rows[shard]
            if seen is not None:
                here = shards == shard
                rows[here] = seen[rows[here]]
        if len(present) <= FEW_SHARDS:
            for shard in present:
                here = shards == shard
                out[here] = self._arrays[shard][rows[here]]
        else:
            arrays = self._arrays
            for k, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
                out[k] = arrays[shard][row]
        return out


def _label_ids(column: pa.Array, ids: Mapping[str, int] | None) -> np.ndarray:
    """Labels as int64, -1 where there is none."""
    if isinstance(column, pa.DictionaryArray):
        assert ids is not None  # names in one shard are names in all
        table = np.array([ids[name] for name in column.dictionary.to_pylist()] or [-1], np.int64)
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.where(codes < 0, -1, table[codes])
    numbers = column.fill_null(-1).to_numpy(zero_copy_only=False)
    if ids is None:
        return numbers
    return np.array([-1 if n < 0 else ids[str(n)] for n in numbers.tolist()], np.int64)
