"""The header of an npy file, read without trusting it."""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from pipeline.readers.entries import Refused
from pipeline.readers.names import describe
from pipeline.readers.streams import InputStream

MAX_HEADER_BYTES = 10_000  # as in numpy
_READERS = {  # by version: bytes that hold the length of the header, and what reads it
    b"\x01\x00": (2, npy_format.read_array_header_1_0),
    b"\x02\x00": (4, npy_format.read_array_header_2_0),
}


@dataclass(frozen=True)
class ArrayHeader:
    """What an npy file promises to hold. `shape` may be huge."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool


def read_header(stream: InputStream) -> ArrayHeader:
    """Reads the header, up to where the values begin.

    Raises:
        Refused: it is empty, cut short, or no header of an npy file.
    """
    start = stream.read(8)
    if not start and stream.fault is None:
        raise Refused("empty", "the file is empty")
    reader = _READERS.get(start[6:])
    if start[:6] != npy_format.MAGIC_PREFIX or reader is None:
        raise Refused("undecodable", stream.fault or "it is no npy file of version 1 or 2")
    width, read = reader
    prefix = stream.read(width)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise Refused("undecodable", f"its header has {length:,} bytes")
    text = stream.read(length)
    if len(prefix) < width or len(text) < length:
        raise Refused("truncated", "it ends inside its header")
    try:
        with warnings.catch_warnings():  # of headers that Python 2 wrote, and odd ones
            warnings.simplefilter("ignore")
            shape, is_fortran, dtype = read(io.BytesIO(prefix + text))
    except Exception as error:  # a parser of Python raises anything, and reads no file here
        raise Refused("undecodable", f"its header is damaged: {describe(error)}") from error
    if not all(0 <= size < 2**63 for size in shape):
        raise Refused("wrong_shape", "its sizes must be from 0 to 2^63 - 1")
    return ArrayHeader(shape, dtype, is_fortran)
