"""Loose files: the directory that a file lies in, below the pattern, is its class."""

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
        if file.fault:
            yield Refusal(file.name, "not_a_file", f"it is {file.fault}")
            continue
        if file.num_bytes > MAX_FILE_BYTES:
            detail = f"{file.num_bytes:,} bytes are more than {MAX_FILE_BYTES:,}"
            yield Refusal(file.name, "too_large", detail)
            continue
        try:
            label = class_of(file, data)
        except Refused as refused:
            yield Refusal(file.name, refused.reason, refused.detail)
            continue
        with open_once(file) as opened:
            content = opened.read()
        if data.is_sequence:
            yield from iter_npy(io.BytesIO(content), data, file.name, label)
        else:
            yield Item(file.name, content, label)


def class_of(file: InputFile, data: DataConfig) -> Label:
    """The class that the directory of a file is.

    Raises:
        Refused: it is none.
    """
    if not (file.class_name and data.label_field):
        return None
    try:
        return parse_label(file.class_name)
    except Refused as refused:
        detail = f"its directory is no class: {refused.detail}; see data.label_field"
        raise Refused(refused.reason, detail) from refused
