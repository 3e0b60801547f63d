"""Parquet files, as Hugging Face writes them: a row is an image or a sequence, with its label.

Which columns those are, and what a row is made into, is in `columns.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.readers.columns import (
    find_content,
    find_label,
    image_at,
    label_at,
    leaf_of,
    sequence_at,
)
from pipeline.readers.entries import Entry, Item, Refusal, Refused
from pipeline.readers.names import describe
from pipeline.readers.streams import SeekableInput
from pipeline.settings import DataConfig

ROWS_AT_ONCE = 4  # twice as fast as 1, as fast as 64; one dictionary value may repeat in all
WHOLE_BYTES = 1 << 28  # of a file that is read by whole columns: no page is believed its size
BUFFER_BYTES = 1 << 18  # at a time of a column of a larger file
MAX_THRIFT_BYTES = 1 << 24  # of one text in the metadata
MAX_THRIFT_ITEMS = 1 << 17  # in one list of the metadata; of a damaged size, all are allocated
FREE_BYTES = 1 << 30  # that a row group may decode to, however small it is
MAX_INFLATION = 100  # times the size of the file that it may decode to beyond that
_FAULTS = (  # what pyarrow raises at damaged files
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
)


def iter_parquet(file: IO[bytes], data: DataConfig) -> Iterator[Entry]:
    """Yields the rows of a Parquet file, in their order.

    A row group that is damaged loses the rows from there to its end: one refusal with their number.

    Args:
        file: can be read at random.
        data: the columns of the content and the label.

    Raises:
        MismatchError: the columns that the config names or leaves to be found cannot be used.
    """
    source = SeekableInput(file)
    if not source.num_bytes:
        yield Refusal("", "empty", "the file is empty", hides_more=True)
        return
    try:
        with _faults(source):
            parquet = pq.ParquetFile(
                source,
                pre_buffer=False,
                buffer_size=0 if source.num_bytes <= WHOLE_BYTES else BUFFER_BYTES,
                thrift_string_size_limit=MAX_THRIFT_BYTES,
                thrift_container_size_limit=MAX_THRIFT_ITEMS,
                page_checksum_verification=True,
            )
            schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    except Refused as refused:
        detail = f"it is no readable Parquet file: {refused.detail}"
        yield Refusal("", "unreadable_shard", detail, hides_more=True)
        return
    content = find_content(schema, data)
    label = find_label(schema, content, data)
    columns = [leaf_of(schema.field(content)), *([label] if label else [])]
    first = 0
    for index in range(parquet.num_row_groups):
        promised, count, fault = 0, 0, "they are missing"
        try:
            with _faults(source):
                # Not its columns: pyarrow ends the process at some faults of their metadata.
                group = parquet.metadata.row_group(index)
                promised, size = group.num_rows, group.total_byte_size
            if size > max(FREE_BYTES, MAX_INFLATION * source.num_bytes):
                raise Refused("too_large", f"they become {size:,} bytes")
            for batch in _iter_batches(parquet, index, columns, source):
                for row in range(batch.num_rows):
                    name = f"row {first + count:08d}"
                    try:
                        with _faults(source):
                            entry: Entry = _read_row(batch, row, name, content, label, data)
                    except Refused as refused:
                        entry = Refusal(name, refused.reason, refused.detail)
                    yield entry
                    count += 1
        except Refused as refused:
            fault = refused.detail
        if count < promised:
            detail = f"{promised - count:,} rows cannot be read: {fault}"
            yield Refusal(f"row {first + count:08d}", "unreadable_tail", detail, promised - count)
        first += max(promised, count)
    if first < num_rows:
        detail = f"{num_rows - first:,} rows are in no row group"
        yield Refusal(f"row {first:08d}", "unreadable_tail", detail, num_rows - first)


def _iter_batches(
    parquet: pq.ParquetFile, index: int, columns: list[str], source: SeekableInput
) -> Iterator[pa.RecordBatch]:
    with _faults(source):
        batches = parquet.iter_batches(
            ROWS_AT_ONCE, row_groups=[index], columns=columns, use_threads=False
        )
    while True:
        with _faults(source):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _read_row(
    batch: pa.RecordBatch, row: int, name: str, content: str, label: str | None, data: DataConfig
) -> Item:
    found = None if label is None else label_at(batch.column(label), row)
    if data.is_sequence:
        return Item(name, sequence_at(batch.column(content), row, data), found)
    return Item(name, image_at(batch.column(content), row), found)


@contextmanager
def _faults(source: SeekableInput) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        source.raise_fault()
        raise Refused("undecodable", describe(error)) from error
