import gzip
import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.readers.entries import Entry, Item, Refusal
from pipeline.readers.idx import iter_idx
from pipeline.settings import DataConfig

DATA = DataConfig(sources=("x",), resolution=8, max_pixels=10_000)


def idx(array: np.ndarray) -> bytes:
    magic = bytes([0, 0, 0x08, array.ndim])
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def read(images: bytes, labels: bytes | None = None) -> list[Entry]:
    label_file = None if labels is None else io.BytesIO(labels)
    return list(iter_idx(io.BytesIO(images), label_file, DATA))


def refusals(entries: list[Entry]) -> list[tuple[str, str, int]]:
    return [(e.member, e.reason, e.count) for e in entries if isinstance(e, Refusal)]


@pytest.mark.parametrize("shape", [(5, 7, 9), (5, 7, 9, 3), (5, 7, 9, 1), (5, 7, 9, 4)])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_every_image_comes_with_its_label(
    shape: tuple[int, ...], compress: Callable[[bytes], bytes]
) -> None:
    images, labels = pixels(*shape), np.array([3, 1, 4, 1, 255], np.uint8)
    entries = read(compress(idx(images)), compress(idx(labels)))
    assert len(entries) == 5
    for index, entry in enumerate(entries):
        assert isinstance(entry, Item)
        assert (entry.member, entry.label) == (f"{index:08d}", int(labels[index]))
        assert isinstance(entry.content, np.ndarray)
        assert entry.content.dtype == np.uint8
        assert np.array_equal(entry.content, images[index])


def test_without_labels_there_are_none() -> None:
    assert [entry.label for entry in read(idx(pixels(2, 3, 3))) if isinstance(entry, Item)] == [
        None,
        None,
    ]


@pytest.mark.parametrize("kept", [0, 8, 9, 10])
def test_a_truncated_file_counts_the_images_missing(kept: int) -> None:
    content = idx(pixels(5, 3, 3))[: 16 + kept]
    entries = read(content, idx(np.zeros(5, np.uint8)))
    whole = kept // 9
    assert sum(isinstance(entry, Item) for entry in entries) == whole
    assert refusals(entries) == [("", "unreadable_tail", 5 - whole)]


def test_more_bytes_than_promised_are_told() -> None:
    for more, count in ((b"x", 1), (bytes(9 * 4 + 1), 4)):
        entries = read(idx(pixels(2, 3, 3)) + more)
        assert len(entries) == 3
        assert refusals(entries) == [("", "unreadable_tail", count)]


def test_broken_compression_counts_the_images_missing() -> None:
    content = gzip.compress(idx(pixels(400, 20, 20)))
    entries = read(content[: len(content) // 2])
    ((member, reason, count),) = refusals(entries)
    assert (member, reason) == ("", "unreadable_tail")
    assert count == 400 - (len(entries) - 1)
    assert isinstance(entries[-1], Refusal)
    assert "the gzip data is cut short" in entries[-1].detail


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (gzip.compress(b"", mtime=0), "empty"),
        (b"\0\0\x08", "unreadable_shard"),
        (b"\0\0\x08\x03\0\0\0\x01\0\0", "unreadable_shard"),
        (b"\0\0\x0d\x03" + struct.pack(">3I", 1, 2, 2) + bytes(16), "unreadable_shard"),  # float
        (b"\0\0\x08\x02" + struct.pack(">2I", 1, 2) + bytes(2), "unreadable_shard"),
        (b"\0\x01\x08\x03" + struct.pack(">3I", 1, 2, 2) + bytes(4), "unreadable_shard"),
        (b"\x03\x08\0\0" + struct.pack("<3I", 1, 2, 2) + bytes(4), "unreadable_shard"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 5, 0, 2), "unreadable_shard"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 5, 101, 100), "unreadable_shard"),
        (b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3), "unreadable_shard"),
        (b"\0\0\x08\x04" + struct.pack(">4I", 1, 2, 2, 2) + bytes(8), "unreadable_shard"),
        (b"\0\0\x08\x04" + struct.pack(">4I", 1, 2, 2, 2**32 - 1), "unreadable_shard"),
        (b"P5 no idx", "unreadable_shard"),
    ],
)
def test_a_file_that_is_no_idx_of_images_is_refused(content: bytes, reason: str) -> None:
    assert refusals(read(content)) == [("", reason, 1)]
    assert len(read(content)) == 1


def test_a_hostile_number_of_images_is_counted_not_allocated() -> None:
    content = b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2, 2) + bytes(8)
    assert refusals(read(content)) == [("", "unreadable_tail", 2**32 - 3)]


def test_no_images_are_no_entries() -> None:
    assert read(idx(pixels(0, 3, 3)), idx(np.zeros(0, np.uint8))) == []


@pytest.mark.parametrize(
    ("labels", "known", "fault"),
    [
        (b"", 0, "the file of labels is empty"),
        (b"\0\0\x08\x03", 0, "no IDX file of labels as bytes: it begins with 00000803"),
        (idx(np.zeros(3, np.uint8)), 3, "there are 3 labels for 5 images"),
        (idx(np.zeros(7, np.uint8)), 5, "there are 7 labels for 5 images"),
        (idx(np.zeros(5, np.uint8))[:-2], 3, "the file ends after 3 labels"),
        (b"\x1f\x8b\x08 no gzip", 0, "the gzip data is"),
    ],
)
def test_images_that_labels_lack_for_are_refused_once(
    labels: bytes, known: int, fault: str
) -> None:
    *items, refusal = read(idx(pixels(5, 2, 2)), labels)
    assert [item.label for item in items if isinstance(item, Item)] == [0] * known
    assert len(items) == known
    assert isinstance(refusal, Refusal)
    assert (refusal.member, refusal.reason) == ("labels", "label_invalid")
    assert refusal.count == 5 - known
    assert fault in refusal.detail


@pytest.mark.parametrize("error", [OSError("disk"), DataError("storage")])
def test_an_error_of_the_storage_is_not_taken_for_bad_content(
    failing_file: Callable[..., Any], error: Exception
) -> None:
    content = idx(pixels(50, 20, 20))
    with pytest.raises(type(error)):
        list(iter_idx(failing_file(content, error), None, DATA))
    with pytest.raises(type(error)):
        list(iter_idx(io.BytesIO(content), failing_file(idx(pixels(50)), error), DATA))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_no_damage_raises_and_every_image_is_accounted_for(
    iter_damaged: Callable[..., Iterator[bytes]], compress: Callable[[bytes], bytes]
) -> None:
    images, labels = idx(pixels(20, 4, 4)), idx(np.arange(20, dtype=np.uint8))
    for damaged in iter_damaged(compress(images), 300):
        assert read(damaged, labels)
    for damaged in iter_damaged(compress(labels), 300):
        entries = read(images, damaged)
        stored = sum(isinstance(entry, Item) for entry in entries)
        assert stored + sum(count for _, _, count in refusals(entries)) == 20
