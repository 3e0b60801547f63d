"""The npy format, read without trusting it: the header of an array, and its values.

The header is a Python literal, which numpy evaluates: that warns of some headers, and hostile ones
may be slow. Here it is searched for what describes an array of numbers or text; nothing is
evaluated, and no object is ever unpickled.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.readers.entries import MAX_FILE_BYTES, Refused
from pipeline.readers.streams import InputStream

MAX_HEADER_BYTES = 10_000  # as in numpy; the usual ones take 118

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by version of the format
_DESCR = re.compile(rb"""["']descr["']\s*:\s*["']([<>|=]?[fiubcSU]\d{1,6})["']""")
_ORDER = re.compile(rb"""["']fortran_order["']\s*:\s*(True|False)""")
_SHAPE = re.compile(rb"""["']shape["']\s*:\s*\(([\d\s,L]{0,200})\)""")  # Python 2 wrote 16L
_NUMBERS = re.compile(r"[<>|=]?(f[248]|[iu][1248])")


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
    if not start.startswith(_MAGIC):
        raise Refused("undecodable", stream.fault or "it is no npy file")
    if len(start) < 8:
        raise Refused("truncated", "it ends inside its header")
    width = _LENGTH_BYTES.get(start[6])
    if width is None:
        raise Refused("undecodable", f"version {start[6]} of npy is unknown")
    prefix = stream.read(width)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise Refused("undecodable", f"a header of {length:,} bytes is too long")
    text = stream.read(length)
    if len(prefix) < width or len(text) < length:
        raise Refused("truncated", "it ends inside its header")
    return _parse_header(text)


def read_values(stream: InputStream, header: ArrayHeader) -> np.ndarray:
    """Reads all values of an array, in its shape.

    Raises:
        Refused: there are too many, or fewer than promised.
    """
    size = math.prod(header.shape) * header.dtype.itemsize
    if size > MAX_FILE_BYTES:
        detail = f"an array of {size:,} bytes is more than {MAX_FILE_BYTES:,}"
        raise Refused("too_large", detail)
    content = stream.read(size)
    if len(content) < size:
        detail = f"it holds {len(content):,} of {size:,} bytes of values"
        raise Refused("truncated", detail + (f": {stream.fault}" if stream.fault else ""))
    values = np.frombuffer(content, header.dtype)
    return values.reshape(header.shape, order="F" if header.is_fortran else "C")


def check_end(stream: InputStream) -> None:
    """Sees that nothing follows an array.

    Raises:
        Refused: something does, or the compression is damaged.
    """
    if stream.skip(1) or stream.fault is not None:
        raise Refused("undecodable", stream.fault or "more follows the array")


def check_numbers(dtype: np.dtype[Any]) -> None:
    """Sees that values are real numbers of a usual kind.

    Raises:
        Refused: they are not.
    """
    if _NUMBERS.fullmatch(dtype.str) is None:
        raise Refused("undecodable", f"the values must be real numbers, got the type {dtype}")


def _parse_header(text: bytes) -> ArrayHeader:
    descr, order, shape = (found.search(text) for found in (_DESCR, _ORDER, _SHAPE))
    if descr is None or order is None or shape is None:
        raise Refused("undecodable", "its header describes no array of numbers or text")
    try:
        dtype = np.dtype(descr[1].decode())
    except (TypeError, ValueError) as error:  # such as <f3
        raise Refused("undecodable", f"its values are {descr[1].decode()}") from error
    axes = tuple(int(axis) for axis in re.findall(rb"\d+", shape[1]))
    if not all(size < 2**63 for size in axes):
        raise Refused("wrong_shape", "its sizes must be from 0 to 2^63 - 1")
    return ArrayHeader(axes, dtype, order[1] == b"True")
