"""The document of a data set: what its units add up to, and when that is refused.

It becomes the artifact `dataset.json` of the step `preprocess`. Duplicates are excluded here, not
in the units: when a shard is removed, the twin of an item of it is seen again without any unit
running.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.hidden import estimate_hidden
from pipeline.settings import NOT_OF_THE_DATA_SET, DataConfig
from pipeline.shards import is_number
from pipeline.sources import InputShard
from pipeline.storage import STORAGE_THREADS, Storage, damaged
from pipeline.units import SPLITS, unit_directory

SCHEMA_VERSION = 2
SHOWN = 10  # refused items in an error


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
        "classes": None if all(map(is_number, seen)) else sorted(seen),
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
        except (pa.ArrowInvalid, OSError) as error:  # the latter of a damaged footer too
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
        return not is_number(label), len(label) if is_number(label) else 0, label

    return {label: labels[label] for label in sorted(labels, key=order) if labels[label] > 0}
