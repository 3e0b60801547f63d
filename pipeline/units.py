"""The unit of preprocessing: one input shard's result, found again by its key.

A unit's result `steps/shard/<key>/` holds Arrow files for each split, an index with a row for
each item, and a manifest, written last. It is keyed by the shard's content and the transform, so
that an unchanged shard is never read again. Making one is in `convert.py`, adding them up in
`dataset_document.py`.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import StorageError
from pipeline.settings import NOT_OF_THE_DATA_SET, DataConfig
from pipeline.sources import InputShard
from pipeline.storage import STORAGE_THREADS, Storage, damaged
from pipeline.workflow import hash_json

SPLITS = ("train", "validation", "test")
UNIT_VERSION = 5  # raise when the same shard and transform make other bytes
# What is decided over all units together, not in each.
_NOT_OF_A_UNIT = NOT_OF_THE_DATA_SET | {"max_bad_fraction", "drop_duplicates"}


def unit_key(shard: InputShard, data: DataConfig) -> str:
    """The key of one input shard's result."""
    transform = data.model_dump(mode="json", exclude=_NOT_OF_A_UNIT)
    return hash_json([UNIT_VERSION, shard.name, shard.sha256 or "unread", transform])


def units_of_step(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The directories of the units that a step `preprocess` or `images` rests on.

    Args:
        settings: of the step's identity.
    """
    transform = {
        name: value
        for key, value in settings.items()
        if (name := key.removeprefix("data.")) != key and name not in _NOT_OF_A_UNIT
    }
    return tuple(
        f"steps/shard/{hash_json([UNIT_VERSION, name, sha256, transform])}"
        for name, sha256 in settings["shards"].items()
    )


def unit_directory(shard: InputShard, data: DataConfig) -> str:
    """Where a unit's result is, below the storage root."""
    return f"steps/shard/{unit_key(shard, data)}"


def missing_units(
    shards: Sequence[InputShard], data: DataConfig, storage: Storage
) -> list[InputShard]:
    """The shards whose result is not there."""

    def is_done(shard: InputShard) -> bool:
        return shard.sha256 is not None and storage.exists(
            f"{unit_directory(shard, data)}/manifest.json"
        )

    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        done = list(pool.map(is_done, shards))
    return [shard for shard, is_there in zip(shards, done, strict=True) if not is_there]


def read_units(
    storage: Storage, shards: Sequence[InputShard], data: DataConfig
) -> list[dict[str, Any]]:
    """The manifests of finished units, in the order of the shards.

    Raises:
        StorageError: one is not to be seen here, or is damaged.
    """

    def read(shard: InputShard) -> dict[str, Any]:
        directory = unit_directory(shard, data)
        try:
            return json.loads(storage.read(f"{directory}/manifest.json"))
        except FileNotFoundError as error:
            raise StorageError(
                f"{storage.uri}/{directory} was written on another node and is not to be seen "
                "here. Set storage.root to a place that every node of the cluster shares."
            ) from error
        except ValueError as error:  # cut short, or no text
            raise damaged(storage, f"{directory}/manifest.json") from error

    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        return list(pool.map(read, shards))
