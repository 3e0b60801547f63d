"""Sequences in numpy's files: `.npy`, and `.npz` where labels lie beside them.

Arrays are read one sequence at a time, except those in Fortran order.
"""

import itertools
import math
from collections.abc import Generator, Iterator
from typing import IO
from zipfile import ZipInfo

import numpy as np

from pipeline.readers.entries import (
    MAX_FILE_BYTES,
    Entry,
    Ignored,
    Item,
    Label,
    MismatchError,
    Refusal,
    Refused,
)
from pipeline.readers.labels import parse_label
from pipeline.readers.names import judge_member, show
from pipeline.readers.npy_headers import (
    ArrayHeader,
    check_end,
    check_numbers,
    read_header,
    read_values,
)
from pipeline.readers.streams import InputStream, Readable
from pipeline.readers.zip_members import ZipInput, kind_of, name_of
from pipeline.settings import LABEL_FIELD, DataConfig

CONTENT_NAMES = ("sequence", "sequences", "x")
LABEL_NAMES = ("labels", "y", "label")
_LABEL_BYTES = 4096  # at most of one label; more is no name

_Labels = Iterator[Label | Refused]
_LACKING = Refused("label_missing", "there are fewer labels")


def iter_npy(
    file: Readable, data: DataConfig, member: str = "", label: Label = None
) -> Iterator[Entry]:
    """Yields the sequences of an npy file.

    Args:
        file: [N, C, L], or [C, L] of one sequence; where C is 1, [N, L] and [L] will do. Read
            once from its start.
        data: the shape [C, L].
        member: what the file is called; several sequences are numbered below it.
        label: of all sequences.
    """
    yield from _iter_sequences(InputStream(file), data, member, itertools.repeat(label))


def iter_npz(file: IO[bytes], data: DataConfig) -> Iterator[Entry]:
    """Yields the sequences of one array of an npz file, with labels from another.

    Args:
        file: can be read at random.
        data: the shape [C, L], and the names of the two arrays. Without `content_field` the
            sequences are "sequence", "sequences", "x" or the only array but the labels; the
            labels are `label_field`, or where that is not set "labels", "y" or "label". A sequence
            that there is no label for is refused where there is such an array.

    Raises:
        MismatchError: an array that the config names is not there, or which one holds the sequences
            cannot be told.
    """
    try:
        archive = ZipInput(file)
    except Refused as refused:
        yield Refusal("", refused.reason, refused.detail, hides_more=True)
        return
    if (detail := archive.unlisted) is not None:
        yield Refusal("", "unreadable_shard", detail, hides_more=True)
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
    labels: _Labels | None = None
    num_labels, fault = 0, None
    if label is not None:
        try:
            num_labels, labels = _open_labels(archive, arrays[label])
        except Refused as refused:
            fault, labels = refused.detail, iter(())
    try:
        stream = _open_array(archive, arrays[content])
    except Refused as refused:
        member = show(f"{content}.npy")
        yield Refusal(member, refused.reason, refused.detail, hides_more=True)
        return
    count = yield from _iter_sequences(stream, data, show(f"{content}.npy"), labels)
    if label is not None and (fault is not None or num_labels != count):
        detail = fault or f"there are {num_labels:,} labels for {count:,} sequences"
        yield Refusal(show(f"{label}.npy"), "label_invalid", detail, max(0, count - num_labels))


def _iter_sequences(
    stream: InputStream, data: DataConfig, member: str, labels: _Labels | None
) -> Generator[Entry, None, int]:
    """Yields the sequences of an array but those that labels lack for; returns how many it has."""
    count, num_sequences, is_one = 0, 0, False
    try:
        header = read_header(stream)
        is_one, num_sequences = _count_sequences(header, data)
        if not num_sequences:
            yield Refusal(member, "empty", "the array holds no sequences")
            return 0
        for sequence in _iter_arrays(stream, header, is_one=is_one):
            name = f"{member}/{count:08d}" if member else f"{count:08d}"
            if is_one and member:
                name = member
            count += 1
            label = None if labels is None else next(labels, _LACKING)
            if isinstance(label, Refused):
                if label is not _LACKING:
                    yield Refusal(name, label.reason, label.detail)
            else:
                yield Item(name, sequence, label)
    except Refused as refused:
        is_known = is_one or (refused.reason == "truncated" and num_sequences > 0)
        lost = num_sequences if is_known else 1
        yield Refusal(member, refused.reason, refused.detail, lost, hides_more=not is_known)
        return count
    if count < num_sequences:
        detail = f"{stream.fault or 'the file ends'} after {count:,} of {num_sequences:,}"
        yield Refusal(member, "unreadable_tail", detail, num_sequences - count)
    elif (rest := stream.skip_rest()) or stream.fault is not None:
        detail = stream.fault or f"{rest:,} bytes more follow the array"
        size = math.prod(header.shape[1:]) * header.dtype.itemsize
        yield Refusal(member, "unreadable_tail", detail, max(1, rest // size))
    return count


def _iter_arrays(stream: InputStream, header: ArrayHeader, *, is_one: bool) -> Iterator[np.ndarray]:
    """The sequences that are there whole."""
    if is_one:
        sequence = read_values(stream, header)
        check_end(stream)
        yield sequence
    elif header.is_fortran:
        yield from read_values(stream, header)
    else:
        shape = header.shape[1:]
        size = math.prod(shape) * header.dtype.itemsize
        if size > MAX_FILE_BYTES:
            detail = f"a sequence of {size:,} bytes is more than {MAX_FILE_BYTES:,}"
            raise Refused("too_large", detail)
        for _ in range(header.shape[0]):
            content = stream.read(size)
            if len(content) < size:
                return
            yield np.frombuffer(content, header.dtype).reshape(shape)


def _count_sequences(header: ArrayHeader, data: DataConfig) -> tuple[bool, int]:
    """Whether the array is one sequence itself, and the number of sequences."""
    check_numbers(header.dtype)
    shapes = [data.shape] if data.channels > 1 else [data.shape, data.shape[1:]]
    if header.shape in shapes:
        return True, 1
    if header.shape[1:] in shapes:
        return False, header.shape[0]
    wanted = ", ".join(map(str, data.shape))
    raise Refused("wrong_shape", f"it is {list(header.shape)}; [N, {wanted}] is read")


def _choose(names: list[str], data: DataConfig) -> tuple[str, str | None]:
    """The names of the array with the sequences, and of that with the labels."""
    held = ", ".join(show(name, 100) for name in names[:20])
    label = data.label_field or None
    if label == LABEL_FIELD:
        label = next((name for name in (label, *LABEL_NAMES) if name in names), None)
    elif label is not None and (label not in names or label == data.content_field):
        raise MismatchError(
            f"has no array {show(label, 100)} of labels; it holds {held}",
            'Set data.label_field to one of them, or to "" where none is to be read.',
        )
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
    raise MismatchError(f"{fault}; it holds {held}", "Set data.content_field to one of them.")


def _open_array(archive: ZipInput, info: ZipInfo) -> InputStream:
    for _ in archive.iter_blocks(info):  # all of it once before: its checksum comes at the end
        pass
    return InputStream(_Blocks(archive.iter_blocks(info)))


def _open_labels(archive: ZipInput, info: ZipInfo) -> tuple[int, _Labels]:
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
