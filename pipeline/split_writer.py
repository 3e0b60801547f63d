"""Writing the items of one split as Arrow files of a target size, and the index of a unit."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.readers.entries import Label
from pipeline.settings import DataConfig
from pipeline.shards import tensor_column, write_arrow
from pipeline.storage import Storage, damaged, hash_content, hashed_name, size_of_content

HASH_BYTES = 16  # of an item's SHA-256 in the index
ITEM_HASH = np.dtype(f"V{HASH_BYTES}")
SUMMED_AT_ONCE = 64  # items: few enough to stay in the cache


class SplitWriter:
    """Collects the items of one split and writes an Arrow file whenever the target is reached.

    Args:
        split: whose name the files bear.
        storage: the root.
        directory: of the unit, below the root.
        data: shape of the items and size of the files.
    """

    def __init__(self, split: str, storage: Storage, directory: str, data: DataConfig) -> None:
        self.split, self.storage, self.directory = split, storage, directory
        self.files: list[dict[str, Any]] = []
        self.all_labels: list[Label] = []
        self._digests = bytearray()  # of all items, packed: memory grows by bytes, not objects
        self._sums = bytearray()
        dtype = np.dtype(np.float32 if data.is_sequence else np.uint8)
        item_bytes = int(np.prod(data.shape)) * dtype.itemsize
        capacity = max(1, data.shard_bytes // item_bytes)
        # Memory that is not written to costs nothing.
        self._items = np.empty((capacity, *data.shape), dtype)
        self._labels: list[Label] = []
        self._sources: list[str] = []

    @property
    def count(self) -> int:
        """Items taken so far."""
        return len(self.all_labels)

    @property
    def digests(self) -> np.ndarray:
        """Of all items, uint8 [N, 16]."""
        return np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, HASH_BYTES)

    @property
    def sums(self) -> np.ndarray:
        """Sum and sum of squares of each channel of all items written, [N, C, 2]."""
        dtype = np.int64 if self._items.dtype == np.uint8 else np.float64
        return np.frombuffer(bytes(self._sums), dtype).reshape(-1, self._items.shape[1], 2)

    def add(self, item: np.ndarray, label: Label, source: str, digest: bytes) -> None:
        """Takes one item; `digest` is the SHA-256 of its content as it came."""
        self._items[len(self._labels)] = item
        self._labels.append(label)
        self._sources.append(source)
        self._digests += digest[:HASH_BYTES]
        self.all_labels.append(label)
        if len(self._labels) == len(self._items):
            self.flush()

    def flush(self) -> None:
        """Writes what is collected as one more file."""
        if not self._labels:
            return
        count = len(self._labels)
        for start in range(0, count, SUMMED_AT_ONCE):
            self._sums += _channel_sums(self._items[start : min(count, start + SUMMED_AT_ONCE)])
        content = write_arrow(self._items[:count], self._labels, self._sources)
        sha256 = hash_content(content)
        name = hashed_name(f"{self.split}-{len(self.files):05d}.arrow", sha256)
        self.storage.create(f"{self.directory}/{name}", content)
        facts = {"count": count, "bytes": size_of_content(content), "sha256": sha256}
        self.files.append({"split": self.split, "file": name, **facts})
        self._labels.clear()
        self._sources.clear()

    def facts(self) -> dict[str, Any]:
        """What the summary over all units needs."""
        names = (str(label) for label in self.all_labels if label is not None)
        return {
            "count": self.count,
            "labels": dict(sorted(Counter(names).items())),
            "unlabelled": sum(label is None for label in self.all_labels),
            "channel_sums": self.sums.sum(0).tolist(),
        }


def make_index(writers: Sequence[SplitWriter]) -> pa.RecordBatch:
    """A row for each item, in the order of the files: what is needed to leave some out later."""
    labels = [label for writer in writers for label in writer.all_labels]
    return pa.record_batch(
        {
            "content": tensor_column(np.concatenate([writer.digests for writer in writers])),
            "label": pa.array([None if n is None else str(n) for n in labels], type=pa.string()),
            "channel_sums": tensor_column(np.concatenate([writer.sums for writer in writers])),
        }
    )


def read_digests(storage: Storage, directory: str) -> np.ndarray:
    """The hashes of a unit's items in the order of its files, void [N] of 16 bytes each.

    Args:
        storage: the root.
        directory: of the unit, below the root.

    Raises:
        StorageError: its manifest or index is missing or damaged.
    """
    path = f"{directory}/manifest.json"
    try:
        path = f"{directory}/{json.loads(storage.read(path))['index']['file']}"
        table = pa.ipc.open_file(storage.read(path)).read_all()
    except (ValueError, OSError) as error:  # also what Arrow raises
        raise damaged(storage, path) from error
    if not table.num_rows:
        return np.zeros(0, ITEM_HASH)
    return table.column("content").chunk(0).to_numpy_ndarray().view(ITEM_HASH).ravel()


def _channel_sums(items: np.ndarray) -> bytes:
    """Sum and sum of squares of each channel, [N, C, 2]: exact int64, float64 of sequences."""
    flat = items.reshape(*items.shape[:2], -1)
    if items.dtype == np.uint8:
        squares, stored = np.square(flat, dtype=np.uint16), np.int64  # 255 squared fits
        exact = np.uint32 if flat.shape[-1] * 255**2 < 1 << 32 else np.int64  # in half the time
    else:
        flat = flat.astype(np.float64)
        squares, exact, stored = np.square(flat), np.float64, np.float64
    sums = flat.sum(-1, dtype=exact), squares.sum(-1, dtype=exact)
    return np.stack(sums, axis=-1).astype(stored).tobytes()
