"""A whole input shard, whatever its format, as entries."""

from collections.abc import Iterator

from pipeline.errors import DataError
from pipeline.identities import open_once, open_seekable
from pipeline.readers.arrays import iter_npy, iter_npz
from pipeline.readers.entries import Entry, MismatchError, Refusal, Refused
from pipeline.readers.files import class_of, iter_files
from pipeline.readers.idx import iter_idx
from pipeline.readers.parquet import iter_parquet
from pipeline.readers.tar import iter_tar
from pipeline.readers.zip import iter_zip
from pipeline.settings import DataConfig
from pipeline.sources import InputShard


def iter_entries(shard: InputShard, data: DataConfig) -> Iterator[Entry]:
    """Yields what is in a shard, always in the same order.

    Args:
        shard: whose content must be that of its hash.
        data: which columns and fields to read.

    Raises:
        DataError: a file cannot be read, changed since the plan, or lacks a column that the config
            names.
    """
    try:
        yield from _iter_format(shard, data)
    except MismatchError as mismatch:
        raise DataError(f"{shard.name} {mismatch.fault}. {mismatch.remedy}") from mismatch


def _iter_format(shard: InputShard, data: DataConfig) -> Iterator[Entry]:
    first = shard.files[0]
    match shard.format:
        case "files":
            yield from iter_files(shard, data)
        case "tar":
            with open_once(first) as file:
                yield from iter_tar(file, data)
        case "idx":
            with open_once(first) as images:
                if len(shard.files) == 1:
                    yield from iter_idx(images, None, data)
                    return
                second = shard.files[1]
                with open_once(second) as labels:
                    yield from iter_idx(images, labels, data)
        case "npy":
            try:
                label = class_of(first, data)
            except Refused as refused:
                yield Refusal("", refused.reason, refused.detail, hides_more=True)
                return
            with open_seekable(first) as file:
                yield from iter_npy(file, data, label=label)
        case _:
            read = {"zip": iter_zip, "parquet": iter_parquet, "npz": iter_npz}
            with open_seekable(first) as file:
                yield from read[shard.format](file, data)
