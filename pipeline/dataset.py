"""The preprocessed data set: its document read, its splits opened.

The document `dataset.json` is the artifact of the step `preprocess`, made in
`dataset_document.py`. It names every Arrow file with its hash, tells what was refused and left
out, and what the numbers of the training split are.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cached_items import (
    CachedItems,
    RemoteShard,
    check_whole_fits,
    check_window_fits,
    fetch_all,
)
from pipeline.errors import DataError
from pipeline.settings import CACHE_BYTES, DataConfig
from pipeline.shard_cache import PATIENCE_S, RemoteFile, ShardCache
from pipeline.shards import ArrowFile, ArrowItems, Items, number_classes, open_table
from pipeline.storage import LocalStorage, Storage, as_storage_error, damaged
from pipeline.units import SPLITS
from pipeline.workflow import read_artifact

MAX_CLASSES = 1 << 16  # by number; ImageNet's largest list has 21,841


def open_split(
    storage: Storage,
    manifest: Mapping[str, Any],
    split: str,
    *,
    whole: bool = True,
    cache_bytes: int = CACHE_BYTES,
    patience_s: float = PATIENCE_S,
) -> Items:
    """Opens the items of one split of a preprocessed data set; see `open_shards`.

    Args:
        storage: the root.
        manifest: of the step `preprocess`.
        split: `train`, `validation` or `test`.
        whole: whether all of it is going to be read at random.
        cache_bytes: `data.cache_bytes`.
        patience_s: how long a remote shard that cannot be read is tried again, in seconds.

    Raises:
        DataError: it is remote, to be read at random, and larger than the cache.
        StorageError: a shard is missing or damaged.
    """
    document = read_dataset(storage, manifest)
    shards = document["shards"]
    how: dict[str, Any] = {"whole": whole, "cache_bytes": cache_bytes, "patience_s": patience_s}
    return open_shards(storage, document, shards, split, **how)


def open_shards(
    storage: Storage,
    document: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    split: str,
    *,
    whole: bool = True,
    cache_bytes: int = CACHE_BYTES,
    patience_s: float = PATIENCE_S,
) -> Items:
    """Opens the items that came from some input shards.

    Local shards are memory-mapped. Remote ones are cached on local disk: all of them now when the
    `whole` is to be read at random; else each when it is needed, or ahead of that by `prefetch`.

    Args:
        storage: the root.
        document: of the data set.
        shards: some of its `shards`.
        split: `train`, `validation` or `test`.
        whole: whether all of it is going to be read at random.
        cache_bytes: `data.cache_bytes`.
        patience_s: how long a remote shard that cannot be read is tried again, in seconds.

    Raises:
        DataError: it is remote, to be read at random, and larger than the cache.
        StorageError: a shard is missing or damaged.
    """
    files = _files_of(shards, split)
    if not isinstance(storage, LocalStorage):
        remote = _remote(files)
        cache = ShardCache(storage, cache_bytes, patience_s=patience_s)
        if whole:
            return fetch_all(remote, cache, document["classes"])
        label_ids = number_classes(document["classes"])
        return CachedItems(remote, document["shape"], document["dtype"], cache, label_ids)
    local = [ArrowFile(storage.local_path(path), file.get("excluded", ())) for path, file in files]
    tables = [
        _open_local(storage, path, arrow.path, file["bytes"])
        for arrow, (path, file) in zip(local, files, strict=True)
    ]
    return ArrowItems(local, document["classes"], tables)


def check_cache_fits(
    storage: Storage,
    manifest: Mapping[str, Any],
    data: DataConfig,
    *,
    global_batch_size: int,
    num_groups: int,
) -> None:
    """Refuses to train on what the shard cache of a node cannot hold; fetches nothing.

    Args:
        storage: the root; nothing is cached of a local one.
        manifest: of the step `preprocess`.
        data: how the data set is read.
        global_batch_size: over all ranks.
        num_groups: groups of 16 positions that the ranks of a node have together.

    Raises:
        DataError: with the arithmetic and what to change.
    """
    if isinstance(storage, LocalStorage):
        return
    shards = _remote(_files_of(read_dataset(storage, manifest)["shards"], "train"))
    if data.shuffle_window is None:
        check_whole_fits(shards, data.cache_bytes)
    else:
        check_window_fits(
            shards,
            data.cache_bytes,
            shuffle_window=data.shuffle_window,
            global_batch_size=global_batch_size,
            num_groups=num_groups,
        )


def read_dataset(storage: Storage, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a preprocessed data set.

    Args:
        storage: the root.
        manifest: of the step `preprocess`.

    Raises:
        StorageError: it is missing or damaged.
    """
    return json.loads(read_artifact(storage, manifest, "dataset.json"))


def class_counts(document: Mapping[str, Any], split: str) -> dict[int, int]:
    """The items of a split by label id, for every id from 0 to that of the last class.

    Args:
        document: of the data set.
        split: `train`, `validation` or `test`.

    Raises:
        DataError: there are no labels, or class numbers that are no numbering.
    """
    counts = document["labels"][split]
    return {id_: counts.get(name, 0) for id_, name in enumerate(class_names(document))}


def class_names(document: Mapping[str, Any]) -> list[str]:
    """The label of each id, from 0 to that of the last class; see `class_counts`.

    Raises:
        DataError: there are no labels, or class numbers that are no numbering.
    """
    labels, names = document["labels"], document["classes"]
    if names is None:
        numbers = {int(label) for split in SPLITS for label in labels[split]}
        last = max(numbers, default=-1)
        if last >= MAX_CLASSES:
            raise DataError(
                "A network that is told the class has an embedding for every number up to the "
                f"largest, {last:,}, and the data set has {len(numbers):,} classes. Number them "
                "from 0, or set model.class_conditional = false."
            )
        names = [str(k) for k in range(last + 1)]
    if not names:
        raise DataError(
            "The network is to be told the class of each image, and the data set has no labels. "
            "Put .cls files beside the images or use class folders, or set "
            "model.class_conditional = false."
        )
    return names


def _files_of(
    shards: Sequence[Mapping[str, Any]], split: str
) -> list[tuple[str, Mapping[str, Any]]]:
    """The Arrow files of a split: where each is below the root, and its facts."""
    return [
        (f"{shard['directory']}/{file['file']}", file)
        for shard in shards
        for file in shard["files"]
        if file["split"] == split
    ]


def _open_local(storage: LocalStorage, path: str, local: Path, num_bytes: int) -> pa.Table:
    """The content of a local Arrow file, mapped; size and layout are looked at, not the hash."""
    if local.stat().st_size != num_bytes:
        raise damaged(storage, path)
    with as_storage_error("read", local):
        try:
            return open_table(local)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # it cannot be read, whatever is in it
            raise damaged(storage, path) from error


def _remote(files: Sequence[tuple[str, Mapping[str, Any]]]) -> list[RemoteShard]:
    shards = []
    for path, file in files:
        excluded = file.get("excluded", ())
        remote = RemoteFile(path, file["sha256"], file["bytes"])
        shards.append(RemoteShard(remote, file["count"] - len(excluded), excluded))
    return shards
