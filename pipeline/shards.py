"""Arrow shards: how items are laid out on disk, and how they are read back without copying.

A shard is an uncompressed Arrow IPC file of one record batch with the columns `image`
(`arrow.fixed_shape_tensor`, uint8 [C, H, W]) or `sequence` (float32 [C, L]), `label` (int64 for
numbers, a dictionary of strings for class names, null where there is none) and `source` (shard
and member that the item came from). Equal rows give equal bytes. Plain pyarrow reads it.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.readers.entries import Label


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


class ShardUse(NamedTuple):
    """When a reader needs a shard, in items that it has read since its plan began.

    Between the two all rows of the shard may be asked for.
    """

    shard: int
    since: int  # items read before the first of it can be asked for
    until: int  # items read when it is done with


class Items(Protocol):
    """The items of a split as one sequence, wherever their shards are. One thread reads."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of every image, or [C, L] of every sequence."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """Items of each shard; ids count through the shards in this order."""
        ...

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The items with these ids, uint8 or float32 [len(ids), *shape], a copy."""
        ...

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Their labels, int64 [len(ids)], -1 where there is none."""
        ...

    def prefetch(self, uses: Iterable[ShardUse]) -> None:
        """Says which shards will be needed, in this order, in place of what was said before.

        Called before reading begins and when it goes on elsewhere. What is needed counts from
        this call.
        """
        ...

    def close(self) -> None:
        """Ends what runs in the background; nothing can be read afterwards."""
        ...


@dataclass(frozen=True)
class ArrowFile:
    """A local shard file; rows that are `excluded` are not seen by readers."""

    path: Path
    excluded: Sequence[int] = ()


class OpenShard:
    """The items of one shard that are seen, memory-mapped.

    Args:
        table: of the shard's file, mapped.
        excluded: rows that are not seen.
        label_ids: class ids by name; None where labels are numbers.
    """

    def __init__(
        self, table: pa.Table, excluded: Sequence[int], label_ids: Mapping[str, int] | None
    ) -> None:
        self.array = table.column(0).chunk(0).to_numpy_ndarray()
        self.rows: np.ndarray | None = None  # those seen, where not all are
        self.labels = _label_ids(table.column("label").chunk(0), label_ids)
        if excluded:
            self.rows = np.delete(np.arange(len(self.array)), excluded)
            self.labels = self.labels[self.rows]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copies of some of the items that are seen, by their number among these."""
        return self.array[rows if self.rows is None else self.rows[rows]]

    @property
    def seen(self) -> np.ndarray:
        """The rows of the items that are seen, int64."""
        return np.arange(len(self.array)) if self.rows is None else self.rows


def front_to_back(counts: Sequence[int]) -> Iterator[ShardUse]:
    """The plan of a reader that takes all items in their order, once.

    Args:
        counts: items of each shard.
    """
    since = 0
    for shard, count in enumerate(counts):
        yield ShardUse(shard, since, since + count)
        since += count


def open_table(path: Path) -> pa.Table:
    """The content of an Arrow file, memory-mapped; it stays readable when the file is deleted."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def is_number(label: str) -> bool:
    """Whether a label is a class number: no name of a class is written so."""
    return label.isascii() and label.isdigit()


def number_classes(classes: Sequence[str] | None) -> dict[str, int] | None:
    """Class ids by name; None where labels are numbers."""
    return None if classes is None else {name: id_ for id_, name in enumerate(classes)}


class ArrowItems:
    """The items of several shards as one sequence, memory-mapped and indexed at random.

    Args:
        files: item ids count through them in this order.
        classes: class names by their id; None where labels are numbers.
        tables: the content of each, where it is mapped already.
    """

    def __init__(
        self,
        files: Sequence[ArrowFile],
        classes: Sequence[str] | None = None,
        tables: Sequence[pa.Table] | None = None,
    ) -> None:
        self._shards: list[OpenShard] = []
        label_ids = number_classes(classes)
        for number, file in enumerate(files):
            table = open_table(file.path) if tables is None else tables[number]
            if table.num_rows > len(file.excluded):
                self._shards.append(OpenShard(table, file.excluded, label_ids))
        labels = [shard.labels for shard in self._shards]
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)  # -1: none
        self.counts = [len(part) for part in labels]
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self._views = [memoryview(shard.array.reshape(-1).view(np.uint8)) for shard in self._shards]
        self._item_bytes = self._shards[0].array[0].nbytes if self._shards else 0
        self._rows = None  # of each item in its file, where not all are seen
        if any(shard.rows is not None for shard in self._shards):
            self._rows = np.concatenate([shard.seen for shard in self._shards])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of every image, or [C, L] of every sequence."""
        return self._shards[0].array.shape[1:]

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The items with these ids, uint8 or float32 [len(ids), *shape], a copy."""
        shards, rows = locate(self._ends, ids)
        if self._rows is not None:
            rows = self._rows[ids]
        array, size, views = self._shards[0].array, self._item_bytes, self._views
        places = zip(shards.tolist(), (rows * size).tolist(), strict=True)
        # Three times as fast as numpy's own indexing, whose every item is an array on the way.
        content = bytearray().join([views[shard][at : at + size] for shard, at in places])
        return np.frombuffer(content, array.dtype).reshape(len(ids), *array.shape[1:])

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """The labels of the items with these ids, int64, -1 where there is none."""
        return self.labels[ids]

    def prefetch(self, uses: Iterable[ShardUse]) -> None:
        """Nothing to do: the system reads ahead, and keeps what fits into memory."""

    def close(self) -> None:
        """Nothing to do: the mappings go with the last reference to them."""


def locate(ends: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shard of each item and its row among those of the shard that are seen.

    Args:
        ends: number of items in each shard and all before it.
        ids: of the items.
    """
    shards = np.searchsorted(ends, ids, side="right")
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    return shards, ids - starts[shards]


def _label_ids(column: pa.Array, ids: Mapping[str, int] | None) -> np.ndarray:
    """Labels as int64, -1 where there is none, or a name that only rows have that are not seen."""
    if isinstance(column, pa.DictionaryArray):
        names = column.dictionary.to_pylist()
        if ids is None:  # what is a name is not seen
            ids = {name: int(name) for name in names if is_number(name)}
        table = np.array([ids.get(name, -1) for name in names] or [-1], np.int64)
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.where(codes < 0, -1, table[codes])
    numbers = column.fill_null(-1).to_numpy(zero_copy_only=False)
    if ids is None:
        return numbers
    return np.array([ids.get(str(n), -1) for n in numbers.tolist()], np.int64)
