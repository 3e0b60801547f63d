"""Loose files: the directory that a file lies in, below the pattern, is its class."""

import io
from collections.abc import Iterator

from pipeline.identities import open_once
from pipeline.readers.arrays import iter_npy
from pipeline.readers.entries import (
    MAX_FILE_BYTES,
    Entry,
    Item,
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
        if file.fault:
            yield Refusal(file.name, "not_a_file", f"it is {file.fault}")
            continue
        if file.num_bytes > MAX_FILE_BYTES:
            detail = f"{file.num_bytes:,} bytes are more than {MAX_FILE_BYTES:,}"
            yield Refusal(file.name, "too_large", detail)
            continue
        try:
            label = parse_label(file.class_name) if file.class_name and data.label_field else None
        except Refused as refused:
            detail = f"its directory is no class: {refused.detail}; see data.label_field"
            yield Refusal(file.name, refused.reason, detail)
            continue
        with open_once(file) as opened:
            content = opened.read()
        if not data.is_sequence:
            yield Item(file.name, content, label)
            continue
        for entry in iter_npy(io.BytesIO(content), data, member=file.name):
            yield Item(entry.member, entry.content, label) if isinstance(entry, Item) else entry
