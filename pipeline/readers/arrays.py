"""Sequences in numpy's files: `.npy`, and `.npz` where labels lie beside them.

Arrays are read one sequence at a time, except those in Fortran order.
"""

import math
from collections.abc import Generator, Iterator
from typing import IO
from zipfile import ZipInfo

import numpy as np

from pipeline.errors import DataError
from pipeline.readers.entries import (
    MAX_FILE_BYTES,
    Entry,
    Ignored,
    Item,
    Label,
    Refusal,
    Refused,
)
from pipeline.readers.labels import parse_label
from pipeline.readers.names import judge_member, show
from pipeline.readers.npy_headers import ArrayHeader, read_header
from pipeline.readers.streams import InputStream, Readable
from pipeline.readers.zip_members import ZipInput, kind_of, name_of
from pipeline.settings import DataConfig

CONTENT_NAMES = ("sequence", "sequences", "x")
LABEL_NAMES = ("labels", "y", "label")
_LABEL_BYTES = 4096  # at most of one label; more is no name


def iter_npy(file: Readable, data: DataConfig, member: str = "") -> Iterator[Entry]:
    """Yields the sequences of an npy file.

    Args:
        file: [N, C, L], or [C, L] of one sequence; where C is 1, [N, L] and [L] will do. Read
            once from its start.
        data: the shape [C, L].
        member: what the file is called; several sequences are numbered below it.
    """
    yield from _iter_sequences(InputStream(file), data, member, iter(()))


def iter_npz(file: IO[bytes], data: DataConfig) -> Iterator[Entry]:
    """Yields the sequences of one array of an npz file, with labels from another.

    Args:
        file: can be read at random.
        data: the shape [C, L], and the names of the two arrays. Without `content_field` the
            sequences are "sequence", "sequences", "x" or the only array but the labels; the
            labels are `label_field`, "labels", "y" or "label".

    Raises:
        DataError: which array holds the sequences cannot be told.
    """
    try:
        archive = ZipInput(file)
    except Refused as refused:
        yield Refusal("", refused.reason, refused.detail)
        return
    arrays = {}
    for info in archive.members:
        name = name_of(info)
        if (entry := judge_member(name, kind_of(info), (".npy",))) is not None:
            yield entry
        elif not name.endswith(".npy"):
            yield Ignored(show(name))
        elif name.removesuffix(".npy") in arrays:
            yield Refusal(show(name), "duplicate_key", "the archive has this name already")
        else:
            arrays[name.removesuffix(".npy")] = info
    if data.content_field is None and arrays.keys() <= {data.label_field, *LABEL_NAMES}:
        only = " but one of labels, by its name" if arrays else ""
        yield Refusal("", "empty", f"it holds no array{only}")
        return
    content, label = _choose(list(arrays), data)
    yield from (Ignored(show(f"{name}.npy")) for name in arrays if name not in (content, label))
    labels: Iterator[Label | Refused] = iter(())
    num_labels, fault = 0, None
    if label is not None:
        try:
            num_labels, labels = _open_labels(archive, arrays[label])
        except Refused as refused:
            fault = refused.detail
    try:
        stream = _open_array(archive, arrays[content])
    except Refused as refused:
        yield Refusal(show(f"{content}.npy"), refused.reason, refused.detail)
        return
    count = yield from _iter_sequences(stream, data, show(f"{content}.npy"), labels)
    if label is not None and (fault is not None or num_labels != count):
        detail = fault or f"there are {num_labels:,} labels for {count:,} sequences"
        yield Refusal(show(f"{label}.npy"), "label_invalid", detail, max(1, count - num_labels))


def _iter_sequences(
    stream: InputStream, data: DataConfig, member: str, labels: Iterator[Label | Refused]
) -> Generator[Entry, None, int]:
    """Yields the sequences of an array; returns how many there were."""
    count = 0
    try:
        header = read_header(stream)
        num_sequences = _number_of_sequences(header, data)
        for sequence in _iter_arrays(stream, header, data):
            name = f"{member}/{count:08d}" if member else f"{count:08d}"
            if num_sequences is None and member:
                name = member
            label = next(labels, None)
            count += 1
            if isinstance(label, Refused):
                yield Refusal(name, label.reason, label.detail)
            else:
                yield Item(name, sequence, label)
    except Refused as refused:
        yield Refusal(member, refused.reason, refused.detail)
        return count
    missing = (1 if num_sequences is None else num_sequences) - count
    if missing:
        detail = f"{stream.fault or 'the file ends'} after {count:,} of {count + missing:,}"
        yield Refusal(member, "unreadable_tail", detail, missing)
    elif stream.skip(1) or stream.fault is not None:
        yield Refusal(member, "unreadable_tail", stream.fault or "more follows the array")
    return count


def _iter_arrays(
    stream: InputStream, header: ArrayHeader, data: DataConfig
) -> Iterator[np.ndarray]:
    """The sequences that are there whole."""
    num_sequences = _number_of_sequences(header, data)
    if header.is_fortran and len(header.shape) > 1:
        size = math.prod(header.shape) * header.dtype.itemsize
        _check_size(size, "an array in Fortran order of")
        content = stream.read(size)
        if len(content) < size:
            raise Refused("truncated", f"it has {len(content):,} of {size:,} bytes")
        array = np.frombuffer(content, header.dtype).reshape(header.shape, order="F")
        yield from [array] if num_sequences is None else array
        return
    shape = header.shape if num_sequences is None else header.shape[1:]
    size = math.prod(shape) * header.dtype.itemsize
    _check_size(size, "a sequence of")
    for _ in range(1 if num_sequences is None else num_sequences):
        content = stream.read(size)
        if len(content) < size:
            return
        yield np.frombuffer(content, header.dtype).reshape(shape)


def _number_of_sequences(header: ArrayHeader, data: DataConfig) -> int | None:
    """N, or None when the array is one sequence itself."""
    if header.dtype.kind not in "fiu":
        raise Refused("undecodable", f"values of the type {header.dtype} are no numbers")
    shapes = [data.shape] if data.channels > 1 else [data.shape, data.shape[1:]]
    if header.shape in shapes:
        return None
    if header.shape[1:] in shapes:
        return header.shape[0]
    wanted = ", ".join(map(str, data.shape))
    raise Refused("wrong_shape", f"it is {list(header.shape)}; [N, {wanted}] is read")


def _check_size(size: int, what: str) -> None:
    if size > MAX_FILE_BYTES:
        raise Refused("too_large", f"{what} {size:,} bytes is more than {MAX_FILE_BYTES:,}")


def _choose(names: list[str], data: DataConfig) -> tuple[str, str | None]:
    """The names of the array with the sequences, and of that with the labels."""
    label = next((n for n in (data.label_field, *LABEL_NAMES) if n in names), None)
    if data.content_field is not None:
        if data.content_field in names:
            return data.content_field, label if label != data.content_field else None
        fault = f"has no array called {data.content_field}"
    else:
        others = [name for name in names if name != label]
        known = [name for name in CONTENT_NAMES if name in others]
        if known or len(others) == 1:
            return (known or others)[0], label
        fault = "does not tell which array holds the sequences"
    held = ", ".join(show(name, 100) for name in names[:20])
    raise DataError(f"An npz file {fault}; it holds {held}. Set data.content_field to one of them.")


def _open_array(archive: ZipInput, info: ZipInfo) -> InputStream:
    for _ in archive.iter_blocks(info):  # all of it once before: its checksum comes at the end
        pass
    return InputStream(_Blocks(archive.iter_blocks(info)))


def _open_labels(archive: ZipInput, info: ZipInfo) -> tuple[int, Iterator[Label | Refused]]:
    """The number of labels, and each of them or why it is none."""
    stream = _open_array(archive, info)
    header = read_header(stream)
    size = header.dtype.itemsize
    if len(header.shape) != 1 or header.dtype.kind not in "iufbSU" or not 1 <= size <= _LABEL_BYTES:
        detail = f"labels must be [N] numbers or text, got {header.dtype} {list(header.shape)}"
        raise Refused("label_invalid", detail)
    count = min(header.shape[0], (info.file_size - stream.position) // size)
    return count, (_label_of(stream.read(size), header.dtype) for _ in range(count))


def _label_of(content: bytes, dtype: np.dtype) -> Label | Refused:
    try:
        return parse_label(np.frombuffer(content, dtype)[0].item())
    except Refused as refused:
        return refused
    except ValueError:
        return Refused("label_invalid", "the label is no text")


class _Blocks:
    """Blocks as a file that is read once."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks

    def read(self, size: int, /) -> bytes:
        """The next block, of whatever size."""
        return next(self._blocks, b"")
