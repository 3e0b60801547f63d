"""The preprocessed data set: the units added up in one document, and its splits opened.

The document `dataset.json` is the artifact of the step `preprocess`. It names every Arrow file
with its hash, tells what was refused and left out, and what the numbers of the training split
are. Duplicates are excluded here, not in the units: when a shard is removed, the twin of an item
of it is seen again without any unit running.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cached_items import (
    CachedItems,
    RemoteShard,
    check_whole_fits,
    check_window_fits,
    fetch_all,
)
from pipeline.errors import DataError
from pipeline.hidden import estimate_hidden
from pipeline.settings import CACHE_BYTES, NOT_OF_THE_DATA_SET, DataConfig
from pipeline.shard_cache import PATIENCE_S, RemoteFile, ShardCache
from pipeline.shards import ArrowFile, ArrowItems, Items, number_classes, open_table
from pipeline.sources import InputShard
from pipeline.storage import STORAGE_THREADS, LocalStorage, Storage, as_storage_error, damaged
from pipeline.units import SPLITS, unit_directory
from pipeline.workflow import read_artifact

SCHEMA_VERSION = 2
SHOWN = 10  # refused items in an error
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


def make_document(
    data: DataConfig,
    storage: Storage,
    shards: Sequence[InputShard],
    units: Sequence[dict[str, Any]],
    ignored: Sequence[str],
) -> dict[str, Any]:
    """Adds up the units.

    Args:
        data: the transform.
        storage: the root, where the units are.
        shards: the input, by name.
        units: the manifests of the shards' results, in the same order.
        ignored: files of the sources that are nothing by their names.
    """
    counts = Counter[str]()
    labels = {split: Counter[str]() for split in SPLITS}
    unlabelled = Counter[str]()
    sums = {split: _zero_sums(data) for split in SPLITS}
    left_out = Counter[str]({"name": len(ignored)})
    for unit in units:
        left_out.update(unit["left_out"])
        for split in SPLITS:
            facts = unit["splits"][split]
            counts[split] += facts["count"]
            labels[split].update(facts["labels"])
            unlabelled[split] += facts["unlabelled"]
            sums[split] += np.array(facts["channel_sums"], sums[split].dtype)
    rows = [
        {
            "input": unit["input"],
            "directory": unit_directory(shard, data),
            "files": [dict(file) for file in unit["files"]],
        }
        for shard, unit in zip(shards, units, strict=True)
    ]
    if data.drop_duplicates:
        left_out["duplicate"] = _exclude_duplicates(
            storage, units, rows, counts, labels, unlabelled, sums
        )
    has_names = any(unit["splits"][split]["has_names"] for unit in units for split in SPLITS)
    seen = {label for split in SPLITS for label in labels[split] if labels[split][label]}
    refused = estimate_hidden(shards, units)
    by_reason = Counter[str]()
    for item in refused:
        by_reason[item["reason"]] += item["count"]
    mean, std = _mean_and_std(sums["train"], counts["train"], data)
    return {
        "schema_version": SCHEMA_VERSION,
        "shape": list(data.shape),
        "dtype": "float32" if data.is_sequence else "uint8",
        "counts": {split: counts[split] for split in SPLITS},
        "channel_mean": mean,
        "channel_std": std,
        "labels": {split: _sorted_labels(labels[split]) for split in SPLITS},
        "unlabelled": {split: unlabelled[split] for split in SPLITS},
        "classes": sorted(seen) if has_names else None,
        "refused": {
            "count": sum(by_reason.values()),
            "by_reason": {reason: n for reason, n in by_reason.most_common() if n},
            "items": refused,
        },
        "left_out": {reason: n for reason, n in sorted(left_out.items()) if n},
        "ignored_first": list(ignored[:SHOWN]),
        "animated": sum(unit["animated"] for unit in units),
        "transform": data.model_dump(mode="json", exclude=NOT_OF_THE_DATA_SET),
        "inputs": [
            {
                "name": shard.name,
                "format": shard.format,
                "sha256": shard.sha256,
                "bytes": shard.num_bytes,
                "files": [
                    {"uri": f.uri, "bytes": f.num_bytes, "sha256": f.sha256} for f in shard.files
                ],
            }
            for shard in shards
        ],
        "shards": rows,
    }


def check_document(document: Mapping[str, Any], data: DataConfig, ledger: str) -> None:
    """Refuses a data set of which too much cannot be used, or with a split empty against its will.

    Args:
        document: of the data set.
        data: the limit.
        ledger: where the list of what was refused is.

    Raises:
        DataError: with the first refused items.
    """
    counts, refused = document["counts"], document["refused"]
    total = sum(counts.values()) + refused["count"]
    noun = "sequences" if data.is_sequence else "images"
    if refused["count"] > data.max_bad_fraction * total:
        shown = "\n  ".join(
            f"{item['source']}: {item['reason']}, {item['detail']}"
            for item in refused["items"][:SHOWN]
        )
        raise DataError(
            f"{refused['count']:,} of {total:,} {noun} cannot be used, more than "
            f"data.max_bad_fraction = {data.max_bad_fraction} allows. Mend them or raise the "
            f"limit. All are listed in {ledger}. The first:\n  {shown}"
        )
    shares = {"train": 1.0, "validation": data.validation_fraction, "test": data.test_fraction}
    for split in SPLITS:
        if not counts[split] and shares[split]:
            left_out = ", ".join(f"{n:,} by {why}" for why, n in document["left_out"].items())
            raise DataError(
                f"The {split} split has no {noun} (of {total:,} in all"
                + (f", left out: {left_out}" if left_out else "")
                + f"). Give more {noun}, or change data.validation_fraction and "
                "data.test_fraction."
            )


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


def _exclude_duplicates(
    storage: Storage,
    units: Sequence[dict[str, Any]],
    rows: list[dict[str, Any]],
    counts: Counter[str],
    labels: dict[str, Counter[str]],
    unlabelled: Counter[str],
    sums: dict[str, np.ndarray],
) -> int:
    """Marks every item whose content came before, by input name, and takes it off the sums."""

    def read(row: dict[str, Any], unit: dict[str, Any]) -> pa.Table:
        path = f"{row['directory']}/{unit['index']['file']}"
        try:
            return pa.ipc.open_file(storage.read(path)).read_all()
        except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:  # of a damaged footer
            raise damaged(storage, path) from error

    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        tables = list(pool.map(read, rows, units))
    digests = [t.column("content").chunk(0).to_numpy_ndarray() for t in tables if t.num_rows]
    if not digests:
        return 0
    content = np.concatenate(digests)
    _, first = np.unique(content.view(f"V{content.shape[1]}").ravel(), return_index=True)
    is_first = np.zeros(len(content), bool)
    is_first[first] = True
    start = 0
    for row, table in zip(rows, tables, strict=True):
        here = start
        for file in row["files"]:
            twins = np.flatnonzero(~is_first[here : here + file["count"]])
            if len(twins):
                split, of_table = file["split"], twins + (here - start)
                file["excluded"] = twins.tolist()
                counts[split] -= len(twins)
                found = table.column("label").take(pa.array(of_table)).to_pylist()
                labels[split].subtract(name for name in found if name is not None)
                unlabelled[split] -= found.count(None)
                all_sums = table.column("channel_sums").chunk(0).to_numpy_ndarray()
                sums[split] -= all_sums[of_table].sum(0)
            here += file["count"]
        start += table.num_rows
    return int(len(content) - len(first))


def _zero_sums(data: DataConfig) -> np.ndarray:
    return np.zeros((data.channels, 2), np.float64 if data.is_sequence else np.int64)


def _mean_and_std(
    sums: np.ndarray, count: int, data: DataConfig
) -> tuple[list[float], list[float]]:
    """Of each channel over the training split, in levels of 255 or the sequences' own units."""
    values = max(1, count * int(np.prod(data.shape[1:])))
    mean = sums[:, 0] / values
    variance = np.maximum(sums[:, 1] / values - mean**2, 0)
    return mean.tolist(), np.sqrt(variance).tolist()


def _sorted_labels(labels: Counter[str]) -> dict[str, int]:
    """Numbers by their size, then names."""

    def order(label: str) -> tuple[bool, int, str]:
        return not label.isdigit(), len(label) if label.isdigit() else 0, label

    return {label: labels[label] for label in sorted(labels, key=order) if labels[label] > 0}
