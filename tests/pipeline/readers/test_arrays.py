import contextlib
import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy_format

from pipeline.errors import DataError
from pipeline.readers.arrays import iter_npy, iter_npz
from pipeline.readers.entries import Entry, Item, Refusal
from pipeline.settings import DataConfig

DATA = DataConfig(sources=("x",), sequence_shape=(2, 4))
MONO = DataConfig(sources=("x",), sequence_shape=(1, 4))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(save: Any = np.savez, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **named)
    return buffer.getvalue()


def header(shape: tuple[Any, ...], descr: Any = "<f4", *, fortran: bool = False) -> bytes:
    """The header of an npy file alone, which may say anything."""
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return npy_format.MAGIC_PREFIX + b"\1\0" + struct.pack("<H", len(text)) + text


def sequences(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def read(content: bytes, data: DataConfig = DATA, member: str = "") -> list[Entry]:
    return list(iter_npy(io.BytesIO(content), data, member))


def read_npz(content: bytes, data: DataConfig = DATA) -> list[Entry]:
    return list(iter_npz(io.BytesIO(content), data))


def refusals(entries: list[Entry]) -> list[tuple[str, str, int]]:
    return [(e.member, e.reason, e.count) for e in entries if isinstance(e, Refusal)]


def stack(entries: list[Entry]) -> np.ndarray:
    return np.stack([np.asarray(entry.content) for entry in entries if isinstance(entry, Item)])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i2", ">i8", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_sequence_comes_in_order(dtype: str, order: Any) -> None:
    array = np.asarray(sequences(5, 2, 4) * 10, dtype=dtype, order=order)
    entries = read(npy(array))
    assert np.array_equal(stack(entries), array)
    assert [entry.member for entry in entries] == [f"{k:08d}" for k in range(5)]
    assert {entry.label for entry in entries if isinstance(entry, Item)} == {None}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("data", "shape"), [(DATA, (2, 4)), (MONO, (1, 4)), (MONO, (4,))])
def test_one_sequence_may_be_a_file_of_its_own(
    data: DataConfig, shape: tuple[int, ...], order: Any
) -> None:
    array = np.asarray(sequences(*shape), order=order)
    (entry,) = read(npy(array), data, member="d/a.npy")
    assert isinstance(entry, Item)
    assert entry.member == "d/a.npy"
    assert np.array_equal(np.asarray(entry.content), array)


def test_a_single_channel_may_be_left_out() -> None:
    array = sequences(6, 4)
    entries = read(npy(array), MONO, member="a.npy")
    assert np.array_equal(stack(entries), array)
    assert entries[5].member == "a.npy/00000005"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x93NUM", "undecodable"),
        (b"no npy file", "undecodable"),
        (npy(sequences(3, 2, 4))[:20], "truncated"),
        (npy(sequences(3, 2, 5)), "wrong_shape"),
        (npy(sequences(3, 8)), "wrong_shape"),
        (npy(np.array(1.0)), "wrong_shape"),
        (npy(sequences(3, 1, 2, 4)), "wrong_shape"),
        (npy(sequences(0, 2, 4)), "empty"),
        (header((-1, 2, 4)), "undecodable"),
        (header((1 << 63, 2, 4)), "wrong_shape"),
        (npy(np.zeros((3, 2, 4), bool)), "undecodable"),
        (npy(np.zeros((3, 2, 4), np.complex64)), "undecodable"),
        (npy(np.zeros((3, 2, 4), "S3")), "undecodable"),
        (npy(np.array([[["a", 1]]], object)), "undecodable"),
        (header((3, 2, 4), [("a", "<f4")]), "undecodable"),
        (header((3, 2, 4), "(3,)f4"), "undecodable"),
        (header((3, 2, 4), "f4," * 50), "undecodable"),
        (header((3, 2, 4), "<f3"), "undecodable"),
        (header(("a", 2, 4)), "undecodable"),
        (b"\x93NUMPY\x01\x00\x04\x00{'\\d", "undecodable"),
        (b"\x93NUMPY\x01\x00\xe8\x03" + b"(" * 1000, "undecodable"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1000), "undecodable"),
        (b"\x93NUMPY\x09\x00" + bytes(1000), "undecodable"),
    ],
)
def test_a_file_that_holds_no_sequences_is_refused(content: bytes, reason: str) -> None:
    assert refusals(read(content, member="a.npy")) == [("a.npy", reason, 1)]
    assert len(read(content)) == 1


def test_a_wrong_shape_tells_both() -> None:
    (entry,) = read(npy(sequences(3, 2, 5)))
    assert isinstance(entry, Refusal)
    assert entry.detail == "it is [3, 2, 5]; [N, 2, 4] is read"


def test_a_header_that_python_2_wrote_is_read() -> None:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 2L, 4L), }\n"
    start = npy_format.MAGIC_PREFIX + b"\1\0" + struct.pack("<H", len(text)) + text
    array = sequences(3, 2, 4)
    assert np.array_equal(stack(read(start + array.tobytes())), array)


@pytest.mark.parametrize("kept", [0, 31, 32, 33, 159])
def test_a_truncated_file_counts_the_sequences_missing(kept: int) -> None:
    content = npy(sequences(5, 2, 4))
    entries = read(content[: len(content) - 160 + kept])
    assert sum(isinstance(entry, Item) for entry in entries) == kept // 32
    assert refusals(entries) == [("", "unreadable_tail", 5 - kept // 32)]


def test_a_truncated_file_in_fortran_order_is_refused_whole() -> None:
    content = npy(np.asfortranarray(sequences(5, 2, 4)))
    assert refusals(read(content[:-1])) == [("", "truncated", 5)]


def test_more_bytes_than_promised_are_told() -> None:
    for more, count in ((b"x", 1), (bytes(32 * 3 + 1), 3)):
        entries = read(npy(sequences(2, 2, 4)) + more)
        assert len(entries) == 3
        assert refusals(entries) == [("", "unreadable_tail", count)]


@pytest.mark.parametrize("order", ["C", "F"])
def test_one_sequence_and_more_is_refused_and_not_used(order: Any) -> None:
    content = npy(np.asarray(sequences(2, 4), order=order)) + b"x"
    assert refusals(read(content, member="a.npy")) == [("a.npy", "undecodable", 1)]
    assert len(read(content)) == 1
    assert refusals(read(content[:-2], member="a.npy")) == [("a.npy", "truncated", 1)]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(version: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    npy_format.write_array(buffer, sequences(3, 2, 4), version)
    assert np.array_equal(stack(read(buffer.getvalue())), sequences(3, 2, 4))


def test_a_file_of_many_that_cannot_be_read_hides_them_and_one_of_one_does_not() -> None:
    def hides(content: bytes) -> list[bool]:
        return [entry.hides_more for entry in read(content) if isinstance(entry, Refusal)]

    assert hides(npy(sequences(3, 2, 5))) == [True]
    assert hides(b"no npy file") == [True]
    assert hides(npy(sequences(2, 4))[:-1]) == [False]
    assert hides(npy(sequences(3, 2, 4))[:-1]) == [False]


def test_a_hostile_shape_is_counted_not_allocated() -> None:
    tracemalloc.start()
    entries = read(header((1 << 60, 2, 4)) + bytes(64))
    assert refusals(entries) == [("", "unreadable_tail", (1 << 60) - 2)]
    huge = DATA.model_copy(update={"sequence_shape": (1 << 30, 1 << 30)})
    assert refusals(read(header((1 << 30, 1 << 30)), huge)) == [("", "too_large", 1)]
    fortran = header((1 << 40, 2, 4), fortran=True)
    assert refusals(read(fortran)) == [("", "too_large", 1)]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_array_is_never_read_whole() -> None:
    content = npy(np.zeros((20_000, 2, 4), np.float64))
    file = io.BytesIO(content)
    tracemalloc.start()
    assert sum(1 for _ in iter_npy(file, DATA)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) // 2


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["sequence", "sequences", "x", "anything"])
@pytest.mark.parametrize("label_name", ["label", "labels", "y"])
def test_an_npz_gives_sequences_with_labels(
    save: Callable[..., None], name: str, label_name: str
) -> None:
    array = sequences(5, 2, 4)
    content = npz(save, **{name: array, label_name: np.array([3, 1, -1, 4, 0])})
    entries = read_npz(content)
    assert np.array_equal(stack(entries), array)
    assert [(e.member, e.label) for e in entries if isinstance(e, Item)] == [
        (f"{name}.npy/{k:08d}", label) for k, label in enumerate([3, 1, None, 4, 0])
    ]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array(["cat", "7"]), ["cat", 7]),
        (np.array([b"cat", b"7"]), ["cat", 7]),
        (np.array([1, 2], ">i2"), [1, 2]),
        (np.array([-5, 2]), ["label_invalid", 2]),
        (np.array([1.0, 2.0]), ["label_invalid", "label_invalid"]),
        (np.array([True, False]), ["label_invalid", "label_invalid"]),
        (np.array(["", "a"]), ["label_invalid", "a"]),
    ],
)
def test_labels_are_numbers_or_names(labels: np.ndarray, expected: list[Any]) -> None:
    entries = read_npz(npz(x=sequences(2, 2, 4), y=labels))
    found = [e.label if isinstance(e, Item) else getattr(e, "reason", "") for e in entries]
    assert found == expected


@pytest.mark.parametrize(
    ("labels", "known", "fault"),
    [
        (np.arange(3), 3, "there are 3 labels for 5 sequences"),
        (np.arange(7), 5, "there are 7 labels for 5 sequences"),
        (np.zeros((5, 2), int), 0, r"labels must be [N] numbers or text, got int64 [5, 2]"),
        (np.zeros(5, complex), 0, "labels must be [N] numbers or text"),
        (np.array(["x" * 2000] * 5), 0, "labels must be [N] numbers or text"),
    ],
)
def test_sequences_that_labels_lack_for_are_refused_once(
    labels: np.ndarray, known: int, fault: str
) -> None:
    *items, refusal = read_npz(npz(x=sequences(5, 2, 4), y=labels))
    assert [e.label for e in items if isinstance(e, Item)] == [*range(known)]
    assert len(items) == known
    assert isinstance(refusal, Refusal)
    assert (refusal.member, refusal.reason) == ("y.npy", "label_invalid")
    assert refusal.count == 5 - known
    assert fault in refusal.detail


def test_the_config_names_the_arrays() -> None:
    named = {"a": sequences(2, 2, 4), "b": sequences(2, 2, 4) + 1, "c": np.arange(2)}
    data = DATA.model_copy(update={"content_field": "b", "label_field": "c"})
    entries = read_npz(npz(**named), data)
    assert entries[0].member == "a.npy"  # ignored
    assert np.array_equal(stack(entries), named["b"])
    assert [entry.label for entry in entries[1:] if isinstance(entry, Item)] == [0, 1]


@pytest.mark.parametrize("field", ["klass", "x"])
def test_an_array_of_labels_that_the_config_names_must_be_there(field: str) -> None:
    content = npz(x=sequences(2, 2, 4), label=np.arange(2))
    data = DATA.model_copy(update={"label_field": field, "content_field": "x"})
    with pytest.raises(DataError, match=rf"has no array {field} of labels; it holds x, label\. "):
        read_npz(content, data)


def test_an_empty_name_of_the_array_reads_no_labels() -> None:
    content = npz(x=sequences(2, 2, 4), y=np.zeros((2, 3)))
    entries = read_npz(content, DATA.model_copy(update={"label_field": "", "content_field": "x"}))
    assert [entry.label for entry in entries if isinstance(entry, Item)] == [None, None]


@pytest.mark.parametrize(
    ("named", "field", "message"),
    [
        ({"a": 1, "b": 2}, None, "does not tell which array holds the sequences; it holds a, b. "),
        ({"a": 1, "b": 2}, "c", "has no array called c; it holds a, b. Set data.content_field"),
    ],
)
def test_an_array_that_cannot_be_told_is_a_fault_of_the_config(
    named: dict[str, int], field: str | None, message: str
) -> None:
    content = npz(**{name: sequences(1, 2, 4) for name in named})
    with pytest.raises(DataError, match=message):
        read_npz(content, DATA.model_copy(update={"content_field": field}))


def test_an_npz_that_lost_its_sequences_is_refused() -> None:
    entries = read_npz(npz(label=np.arange(3)))
    assert refusals(entries) == [("", "empty", 1)]


def test_a_damaged_array_is_refused_before_any_of_it_is_used() -> None:
    content = bytearray(npz(x=sequences(100, 2, 4)))
    content[2000] ^= 1
    ((member, reason, _),) = refusals(read_npz(bytes(content)))
    assert (member, reason) == ("x.npy", "undecodable")
    assert len(read_npz(bytes(content))) == 1


def test_a_truncated_array_in_an_npz_counts_the_sequences_missing() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", npy(sequences(5, 2, 4))[:-40])
    entries = read_npz(buffer.getvalue())
    assert len(entries) == 4
    assert refusals(entries) == [("x.npy", "unreadable_tail", 2)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_an_npz_are_judged_like_those_of_a_zip() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("../x.npy", "readme.txt", "x.npy", "x.npy"):
            archive.writestr(name, npy(sequences(1, 2, 4)))
    kinds = [
        (e.member, getattr(e, "reason", type(e).__name__)) for e in read_npz(buffer.getvalue())
    ]
    assert kinds == [
        ("../x.npy", "unsafe_name"),
        ("readme.txt", "Ignored"),
        ("x.npy", "duplicate_key"),
        ("x.npy/00000000", "Item"),
    ]


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"no zip", "unreadable_shard"), (npz(), "empty")]
)
def test_a_file_that_is_no_npz_is_refused(content: bytes, reason: str) -> None:
    assert refusals(read_npz(content)) == [("", reason, 1)]


@pytest.mark.parametrize("error", [OSError("disk"), DataError("storage")])
def test_an_error_of_the_storage_is_not_taken_for_bad_content(
    failing_file: Callable[..., Any], error: Exception
) -> None:
    with pytest.raises(type(error)):
        list(iter_npy(failing_file(npy(sequences(900, 2, 4)), error), DATA))
    with pytest.raises(type(error)):
        list(iter_npz(failing_file(npz(x=sequences(900, 2, 4)), error), DATA))


def test_no_damage_raises(iter_damaged: Callable[..., Iterator[bytes]]) -> None:
    array = sequences(10, 2, 4)
    for content in (npy(array), npy(np.asfortranarray(array)), npy(array[0])):
        for damaged in iter_damaged(content, 200):
            read(damaged)
    for save in (np.savez, np.savez_compressed):
        for damaged in iter_damaged(npz(save, x=array, y=np.array(["a"] * 10)), 300):
            with contextlib.suppress(DataError):  # a name that is no longer what it was
                read_npz(damaged)
