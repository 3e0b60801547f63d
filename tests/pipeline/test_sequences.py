import io
import random
import warnings

import numpy as np
import pytest

from pipeline.readers.entries import Refused
from pipeline.readers.npy_headers import MAX_HEADER_BYTES
from pipeline.sequences import decode_sequence
from pipeline.settings import DataConfig

DATA = DataConfig(sources=("x",), sequence_shape=(2, 5))
ONE_CHANNEL = DataConfig(sources=("x",), sequence_shape=(1, 5))
VALUES = np.arange(10.0).reshape(2, 5)


def npy(values: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version, allow_pickle=True)
    return file.getvalue()


def with_header(header: bytes, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + values


def refusal(content: bytes | np.ndarray, data: DataConfig = DATA) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        decode_sequence(content, data)
    assert caught.value.detail.isprintable()
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    "dtype", ["f2", "<f4", ">f4", "f8", ">f8", "i1", "u1", "<i2", ">u2", "i4", "u4", "i8", ">u8"]
)
@pytest.mark.parametrize("is_file", [True, False])
def test_numbers_of_every_kind_become_float32(dtype: str, is_file: bool) -> None:
    values = VALUES.astype(dtype)
    sequence = decode_sequence(npy(values) if is_file else values, DATA)
    assert sequence.dtype == np.float32
    assert sequence.flags.c_contiguous
    assert np.array_equal(sequence, VALUES)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(version: tuple[int, int]) -> None:
    assert np.array_equal(decode_sequence(npy(VALUES, version), DATA), VALUES)


def test_columns_may_come_first() -> None:
    values = np.asfortranarray(VALUES)
    for content in (npy(values), values):
        sequence = decode_sequence(content, DATA)
        assert np.array_equal(sequence, VALUES)
        assert sequence.flags.c_contiguous


def test_the_sequence_is_a_copy() -> None:
    values = VALUES.astype(np.float32)
    decode_sequence(values, DATA)[:] = -1
    assert values[0, 0] == 0


def test_headers_of_other_programs_are_read() -> None:
    body = VALUES.astype("<f4").tobytes()
    for header in (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 5)}\n",
        b'{"shape":(2,5),"fortran_order":False,"descr":"<f4"}',
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 5L), }",  # Python 2 on Windows
    ):
        assert np.array_equal(decode_sequence(with_header(header, body), DATA), VALUES)


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_one_channel_needs_no_axis(shape: tuple[int, ...]) -> None:
    values = np.arange(5.0).reshape(shape)
    for content in (npy(values), values):
        assert decode_sequence(content, ONE_CHANNEL).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("shape", [(10,), (5, 2), (2, 6), (1, 2, 5), (), (0, 5)])
def test_another_shape_is_refused_and_told(shape: tuple[int, ...]) -> None:
    for content in (npy(np.zeros(shape)), np.zeros(shape)):
        told = f"the shape must be [2, 5], got {list(shape)}"
        assert refusal(content) == ("wrong_shape", told)


def test_the_shape_is_checked_before_the_values_are_read() -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 5), }"
    assert refusal(with_header(header))[0] == "wrong_shape"


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_what_is_not_finite_in_float32_is_counted(bad: float, is_file: bool) -> None:
    values = VALUES.copy()
    values[0, 1] = values[1, 4] = bad
    told = "2 of 10 values are NaN or infinite"
    assert refusal(npy(values) if is_file else values) == ("not_finite", told)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((2, 5), bool),
        np.zeros((2, 5), complex),
        np.zeros((2, 5), object),
        np.zeros((2, 5), "U3"),
        np.zeros((2, 5), "M8[s]"),
        np.zeros((2, 5), [("a", "f4")]),
    ],
)
def test_what_is_no_real_number_is_refused(values: np.ndarray) -> None:
    assert refusal(npy(values))[0] == "undecodable"
    assert refusal(values)[0] == "undecodable"


def test_an_empty_file_is_refused() -> None:
    assert refusal(b"") == ("empty", "the file is empty")


def test_a_file_that_is_cut_short_is_refused() -> None:
    content = npy(VALUES)
    for size in (6, 8, 11, 50, 128, len(content) - 1):
        assert refusal(content[:size])[0] == "truncated"
    assert refusal(content[:-1])[1] == "it holds 79 of 80 bytes of values"


def test_a_file_with_more_than_the_array_is_refused() -> None:
    assert refusal(npy(VALUES) + b"\0") == ("undecodable", "more follows the array")


@pytest.mark.parametrize(
    "content",
    [
        b"PK\3\4" + bytes(30),
        b"1.0,2.0,3.0\n",
        b"\x93NUMPY\7\0" + bytes(100),
        with_header(b"{}" + bytes(20)),
        with_header(b"{'descr': '<f4', 'shape': (2, 5)}"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, -5)}"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 10**9)}"),
        with_header(b"{'descr': '<f9', 'fortran_order': False, 'shape': (2, 5)}"),
        with_header(b"(" * (MAX_HEADER_BYTES + 1)),
    ],
)
def test_what_is_no_npy_file_is_refused(content: bytes) -> None:
    assert refusal(content)[0] == "undecodable"


def test_mutated_files_are_decoded_or_refused() -> None:
    rng, content, reasons = random.Random(0), npy(VALUES), set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3000):
            changed = bytearray(content)
            for _ in range(rng.choice((1, 2, 8))):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            if rng.random() < 0.2:
                del changed[rng.randrange(len(changed)) :]
            try:
                assert decode_sequence(bytes(changed), DATA).shape == (2, 5)
            except Refused as refused:
                reasons.add(refused.reason)
    assert reasons == {"empty", "truncated", "undecodable", "wrong_shape", "not_finite"}
