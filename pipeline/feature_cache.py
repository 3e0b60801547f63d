"""Features by Arrow file: made once for each extractor, and found again by any reference.

    features/<extractor>/<SHA-256 of the Arrow file>.safetensors

holds float32 [N, d] of all rows of the file with the hash of the numbers. Rows that a data set
excludes as duplicates are left out by who reads, so that a twin that comes or goes runs nothing.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy

from pipeline.extractors import extract, extractor_key, load_extractor
from pipeline.host import keep_freed_memory, torch_threads
from pipeline.shard_cache import RemoteFile, ShardCache
from pipeline.shards import open_table
from pipeline.storage import LocalStorage, Storage, damaged, open_storage
from pipeline.units import SPLITS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureFile:
    """An Arrow file of a data set, whose features are wanted.

    Args:
        split: whose items it holds.
        path: below the root.
        sha256: of the file.
        num_bytes: its size.
        count: of its rows.
        excluded: rows that are not of the data set.
    """

    split: str
    path: str
    sha256: str
    num_bytes: int
    count: int
    excluded: tuple[int, ...] = ()


def list_files(document: Mapping[str, Any]) -> list[FeatureFile]:
    """The Arrow files of a data set, by split and in the order of its items.

    Args:
        document: of the data set.
    """
    return [
        FeatureFile(
            split,
            f"{shard['directory']}/{file['file']}",
            file["sha256"],
            file["bytes"],
            file["count"],
            tuple(file.get("excluded", ())),
        )
        for split in SPLITS
        for shard in document["shards"]
        for file in shard["files"]
        if file["split"] == split
    ]


class FeatureCache:
    """The features of an extractor that are below a root.

    Args:
        storage: the root.
        features: the manifest of the step `features`.
    """

    def __init__(self, storage: Storage, features: Mapping[str, Any]) -> None:
        self._storage = storage
        self._num_features: int = features["metrics"]["num_features"]
        self.directory = f"features/{extractor_key(features)}"

    def names(self) -> set[str]:
        """The SHA-256 of the Arrow files whose features are there, whole or not."""
        return {name.partition(".")[0] for name in self._storage.list(self.directory)}

    def path_of(self, file: FeatureFile) -> str:
        """Where the features of a file are, or would be."""
        return f"{self.directory}/{file.sha256}.safetensors"

    def read(self, file: FeatureFile) -> np.ndarray | None:
        """The features of all rows, float32 [N, d]; None where they are not there, or damaged."""
        with contextlib.suppress(FileNotFoundError):
            content = self._storage.read(self.path_of(file))
            with contextlib.suppress(safetensors.SafetensorError, KeyError):
                found = safetensors.numpy.load(content)
                features = found["features"]
                is_whole = (
                    features.shape == (file.count, self._num_features)
                    and features.dtype == np.float32
                    and found["sha256"].tobytes() == _hash(features)
                    and bool(np.isfinite(features).all())
                )
                if is_whole:
                    return features
            path = f"{self._storage.uri}/{self.path_of(file)}"
            logger.warning("The features in %s are damaged and are made again.", path)
            self._storage.delete(self.path_of(file))
        return None

    def write(self, file: FeatureFile, features: np.ndarray) -> None:
        """Keeps the features of all rows; what another task has written meanwhile stays."""
        sha256 = np.frombuffer(_hash(features), np.uint8)
        content = safetensors.numpy.save({"features": features, "sha256": sha256})
        self._storage.create(self.path_of(file), content)


def make_features(
    storage_uri: str,
    features: Mapping[str, Any],
    files: Sequence[FeatureFile],
    cache_bytes: int,
) -> None:
    """A task: the features of some Arrow files, one after the other; those there are passed over.

    Args:
        storage_uri: of the root.
        features: the manifest of the step `features`.
        files: whose features are wanted.
        cache_bytes: `data.cache_bytes`.

    Raises:
        EvaluationError: the extractor cannot be made, or its features are not finite.
        StorageError: a file is missing or damaged.
    """
    storage = open_storage(storage_uri)
    cache = FeatureCache(storage, features)
    extractor = load_extractor(storage, features)
    keep_freed_memory()
    with torch_threads(1):
        for file in files:
            if cache.read(file) is None:
                with _open_items(storage, file, cache_bytes) as items:
                    cache.write(file, extract(extractor, items))


@contextlib.contextmanager
def _open_items(storage: Storage, file: FeatureFile, cache_bytes: int) -> Iterator[np.ndarray]:
    """All rows of an Arrow file, memory-mapped, and checked: features outlive what is read here."""
    if not isinstance(storage, LocalStorage):
        shards = ShardCache(storage, cache_bytes)
        with contextlib.closing(shards):
            table = shards.open_table(RemoteFile(file.path, file.sha256, file.num_bytes))
            yield _items_of(table)
        return
    path = storage.local_path(file.path)
    if _hash_file(path) != file.sha256:
        raise damaged(storage, file.path)
    yield _items_of(open_table(path))


def _items_of(table: pa.Table) -> np.ndarray:
    return table.column(0).chunk(0).to_numpy_ndarray()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(features: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(features).tobytes()).digest()
