import contextlib
import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.readers import columns, parquet
from pipeline.readers.entries import Entry, Item, Refusal
from pipeline.readers.parquet import iter_parquet
from pipeline.settings import DataConfig

DATA = DataConfig(sources=("x",), resolution=8)
SEQUENCES = DataConfig(sources=("x",), sequence_shape=(2, 4))
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def images(count: int) -> pa.Array:
    return pa.array([{"bytes": b"image %d" % k, "path": f"{k}.png"} for k in range(count)])


def sequences(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def read(content: bytes, data: DataConfig = DATA) -> list[Entry]:
    return list(iter_parquet(io.BytesIO(content), data))


def refusals(entries: list[Entry]) -> list[tuple[str, str, int]]:
    return [(e.member, e.reason, e.count) for e in entries if isinstance(e, Refusal)]


def test_every_row_comes_with_its_label_as_hugging_face_writes_it() -> None:
    content = write({"image": images(10), "label": list(range(10))}, row_group_size=4)
    assert read(content) == [Item(f"row {k:08d}", b"image %d" % k, k) for k in range(10)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "picture", "a.b"])
def test_images_are_the_only_column_of_bytes(kind: pa.DataType, name: str) -> None:
    content = write({"id": [1, 2], name: pa.array([b"a", b"b"], kind), "caption": ["x", "y"]})
    assert read(content) == [Item("row 00000000", b"a", None), Item("row 00000001", b"b", None)]


def test_the_config_names_the_columns() -> None:
    content = write({"image": [b"a"], "thumb": [b"b"], "label": [1], "class": ["dog"]})
    data = DATA.model_copy(update={"content_field": "thumb", "label_field": "class"})
    assert read(content) == [Item("row 00000000", b"a", 1)]
    assert read(content, data) == [Item("row 00000000", b"b", "dog")]


@pytest.mark.parametrize(
    ("named", "field", "message"),
    [
        ({"a": [b""], "b": [b""]}, None, r"has 2 columns .*; it has a \(binary\), b \(binary\)"),
        ({"a": [1], "image": ["x.png"]}, None, r"has no columns .* image \(string\)"),
        ({"image": [b""]}, "thumb", r"has no column thumb .* Set data\.content_field"),
        ({"image": [b""], "n": [1]}, "n", "has no column n with images"),
    ],
)
def test_a_column_that_cannot_be_told_is_a_fault_of_the_config(
    named: dict[str, Any], field: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(named), DATA.model_copy(update={"content_field": field}))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([0, -1, None], pa.int8()), [0, None, None]),
        (pa.array([0, 2**63, 1], pa.uint64()), [0, "label_invalid", 1]),
        (pa.array(["cat", "7", ""]), ["cat", 7, "label_invalid"]),
        (pa.array(["cat", "dog", None], pa.large_string()), ["cat", "dog", None]),
        (pa.array(["cat", "dog", "cat"]).dictionary_encode(), ["cat", "dog", "cat"]),
        (pa.array([b"cat", b"\xff", b"7"]), ["cat", "label_invalid", 7]),
        (pa.nulls(3), [None, None, None]),
    ],
)
def test_labels_are_numbers_or_names(labels: pa.Array, expected: list[Any]) -> None:
    entries = read(write({"image": images(3), "label": labels}))
    found = [e.label if isinstance(e, Item) else getattr(e, "reason", "") for e in entries]
    assert found == expected


def test_a_label_that_is_no_utf8_is_refused() -> None:
    content = write({"image": images(1), "label": ["cat"]}, compression="none")
    place = content.index(b"cat")
    (entry,) = read(content[:place] + b"\xff" + content[place + 1 :])
    assert isinstance(entry, Refusal)
    assert entry.reason == "label_invalid"


@pytest.mark.parametrize("labels", [[1.0], [True], [[1, 2]], [{"a": 1}]])
def test_a_column_of_labels_that_are_no_classes_is_a_fault_of_the_config(labels: Any) -> None:
    with pytest.raises(DataError, match="has in its column label no classes but"):
        read(write({"image": images(1), "label": labels}))


@pytest.mark.parametrize("field", ["klass", "image"])
def test_a_column_of_labels_that_the_config_names_must_be_there(field: str) -> None:
    content = write({"image": images(1), "label": [1]})
    with pytest.raises(DataError, match=rf"has no column {field} of labels; .* it has label\. Set"):
        read(content, DATA.model_copy(update={"label_field": field}))


def test_an_empty_name_of_the_column_reads_no_labels() -> None:
    content = write({"image": [b"a"], "label": [1.5]})
    data = DATA.model_copy(update={"label_field": ""})
    assert read(content, data) == [Item("row 00000000", b"a", None)]


def test_a_row_without_an_image_is_refused() -> None:
    rows = [{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"", "path": ""}]
    null, missing, empty = read(write({"image": pa.array(rows, HUGGING_FACE)}))
    assert isinstance(null, Refusal)
    assert (null.reason, null.detail) == ("empty", "its bytes are not in the file")
    assert isinstance(missing, Refusal)
    assert missing.reason == "empty"
    assert empty == Item("row 00000002", b"", None)
    (entry,) = read(write({"image": pa.array([None], pa.binary())}))
    assert refusals([entry]) == [("row 00000000", "empty", 1)]


def test_a_value_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_FILE_BYTES", 100)
    entries = read(write({"image": [b"x" * 101, b"x" * 100]}))
    assert refusals(entries) == [("row 00000000", "too_large", 1)]
    assert len(entries) == 2


def tensors(array: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(array)


@pytest.mark.parametrize(
    "make",
    [
        lambda array: pa.array(array.tolist(), pa.list_(pa.list_(pa.float32()))),
        lambda array: pa.array(array.tolist(), pa.large_list(pa.list_(pa.float64(), 4))),
        lambda array: pa.array(array.reshape(-1, 8).tolist(), pa.list_(pa.float32())),
        lambda array: pa.array(array.reshape(-1, 8).tolist(), pa.list_(pa.float32(), 8)),
        tensors,
        lambda array: tensors(array.transpose(0, 2, 1).copy().transpose(0, 2, 1)),
    ],
)
@pytest.mark.parametrize("name", ["sequence", "signal"])
def test_sequences_come_in_all_kinds_of_lists(
    make: Callable[[np.ndarray], pa.Array], name: str
) -> None:
    array = sequences(9, 2, 4)
    entries = read(write({name: make(array), "label": list(range(9))}), SEQUENCES)
    assert len(entries) == 9
    for k, entry in enumerate(entries):
        assert isinstance(entry, Item)
        assert isinstance(entry.content, np.ndarray)
        assert entry.label == k
        assert np.allclose(entry.content, array[k], rtol=0, atol=1e-7)
        assert entry.content.shape == (2, 4)


def test_a_sequence_whose_parts_do_not_fit_is_refused_alone() -> None:
    rows = [[[1, 2, 3, 4], [5, 6, 7]], [[1, 2, 3, 4]], [[1, 2, 3, 4], None], None, [[1] * 4] * 2]
    entries = read(write({"sequence": pa.array(rows, pa.list_(pa.list_(pa.int16())))}), SEQUENCES)
    assert [reason for _, reason, _ in refusals(entries)] == [*["wrong_shape"] * 3, "empty"]
    assert isinstance(entries[4], Item)
    assert np.array_equal(np.asarray(entries[4].content), np.ones((2, 4)))


def test_a_missing_value_is_not_a_number() -> None:
    (entry,) = read(write({"sequence": [[1.0, None, *range(6)]]}), SEQUENCES)
    assert isinstance(entry, Item)
    assert np.isnan(np.asarray(entry.content)).sum() == 1


def test_columns_of_text_are_no_sequences() -> None:
    with pytest.raises(DataError, match="lists of numbers"):
        read(write({"sequence": [["a"]], "image": [b"x"], "n": [1]}), SEQUENCES)


@pytest.mark.parametrize("content", [b"x", b"PAR1" * 3, b"no parquet file" * 100])
def test_a_file_that_is_no_parquet_is_refused(content: bytes) -> None:
    assert refusals(read(content)) == [("", "unreadable_shard", 1)]


def test_a_truncated_file_is_refused() -> None:
    content = write({"image": images(10)})
    for end in (4, 100, len(content) - 9, len(content) - 1):
        assert refusals(read(content[:end])) == [("", "unreadable_shard", 1)]


def test_an_empty_file_is_refused_and_no_rows_hold_nothing() -> None:
    assert refusals(read(b"")) == [("", "empty", 1)]
    assert read(write({"image": pa.array([], pa.binary())})) == []


@pytest.mark.parametrize("whole_bytes", [0, 1 << 28])
def test_a_damaged_row_group_counts_its_rows_and_the_next_is_read(
    whole_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", whole_bytes)
    rows = [np.random.default_rng(k).bytes(3000) for k in range(30)]
    content = bytearray(
        write(
            {"image": rows},
            row_group_size=10,
            data_page_size=6000,
            write_batch_size=2,
            use_dictionary=False,
            write_statistics=False,  # they would repeat values
            write_page_checksum=True,
        )
    )
    content[content.index(rows[14]) + 7] ^= 1
    entries = read(bytes(content))
    (bad,) = [entry for entry in entries if isinstance(entry, Refusal)]
    assert (bad.member, bad.reason, bad.count) == ("row 00000014", "unreadable_tail", 6)
    assert "CRC checksum" in bad.detail
    items = {entry.member: entry.content for entry in entries if isinstance(entry, Item)}
    left = [*range(14), *range(20, 30)]
    assert items == {f"row {k:08d}": rows[k] for k in left}


def test_a_row_group_that_inflates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "FREE_BYTES", 1 << 20)
    content = write({"image": [bytes(4 << 20)] * 2}, compression="zstd", use_dictionary=False)
    assert len(content) < 1 << 13
    assert refusals(read(content)) == [("row 00000000", "unreadable_tail", 2)]


def test_rows_that_the_metadata_promises_in_vain_are_counted() -> None:
    content = write({"image": images(50)}, compression="none")
    (length,) = struct.unpack("<I", content[-8:-4])
    footer = bytearray(content[-8 - length : -8])
    place = footer.index(b"\x16\x64")  # field of type int64: 50, zigzag, of the whole file
    footer[place + 1] = 0x7E  # 63
    entries = read(content[: -8 - length] + bytes(footer) + content[-8:])
    assert sum(isinstance(entry, Item) for entry in entries) == 50
    assert refusals(entries) == [("row 00000050", "unreadable_tail", 13)]


@pytest.mark.parametrize("error", [OSError("disk"), DataError("storage")])
@pytest.mark.parametrize("start", [0, 1])
def test_an_error_of_the_storage_is_not_taken_for_bad_content(error: Exception, start: int) -> None:
    class Failing(io.BytesIO):
        is_broken = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.is_broken:
                raise error
            return super().read(size)

    file = Failing(write({"image": images(40)}, row_group_size=4))
    file.is_broken = start == 0
    entries = iter_parquet(file, DATA)
    if start:
        assert next(entries) == Item("row 00000000", b"image 0", None)
        file.is_broken = True
    with pytest.raises(type(error)) as raised:
        list(entries)
    assert raised.value is error


WRITE = {
    "image": lambda **options: write(
        {"image": images(40), "label": pa.array(["a", "b"] * 20).dictionary_encode()}, **options
    ),
    "sequence": lambda **options: write(
        {"sequence": sequences(40, 2, 4).tolist(), "label": list(range(40))}, **options
    ),
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "row_group_size": 15},
        {"compression": "zstd", "write_page_checksum": True},
        {"data_page_version": "2.0", "use_dictionary": False},
    ],
)
def test_no_damage_raises_or_ends_the_process(
    iter_damaged: Callable[..., Iterator[bytes]], kind: str, options: dict[str, Any]
) -> None:
    data = DATA if kind == "image" else SEQUENCES
    for damaged in iter_damaged(WRITE[kind](**options), 150):
        with contextlib.suppress(DataError):  # a column that is no longer what it was
            assert read(damaged, data)
