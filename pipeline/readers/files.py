"""Loose files: the directory that a file lies in is its class."""

import io
from collections.abc import Iterator

from pipeline.identities import InputFile, open_once
from pipeline.readers.arrays import iter_npy
from pipeline.readers.entries import (
    MAX_FILE_BYTES,
    Entry,
    Item,
    Label,
    Refusal,
    Refused,
)
from pipeline.readers.labels import parse_label
from pipeline.settings import DataConfig
from pipeline.sources import InputShard


def iter_files(shard: InputShard, data: DataConfig) -> Iterator[Entry]:
    """Yields the files of a bucket, by name.

    Args:
        shard: the bucket.
        data: tells images from sequences.

    Raises:
        DataError: a file cannot be read, or changed since the plan.
    """
    for file in shard.files:
        if file.num_bytes > MAX_FILE_BYTES:
            detail = f"{file.num_bytes:,} bytes are more than {MAX_FILE_BYTES:,}"
            yield Refusal(file.name, "too_large", detail)
            continue
        try:
            label = _class_of(file)
        except Refused as refused:
            yield Refusal(file.name, refused.reason, refused.detail)
            continue
        with open_once(file) as opened:
            content = opened.read()
        if not data.is_sequence:
            yield Item(file.name, content, label)
            continue
        for entry in iter_npy(io.BytesIO(content), data, member=file.name):
            yield Item(entry.member, entry.content, label) if isinstance(entry, Item) else entry


def _class_of(file: InputFile) -> Label:
    """The name of the directory that a file lies in, or None at the top."""
    directory = file.name.rpartition("/")[0].rpartition("/")[2]
    return parse_label(directory) if directory else None
