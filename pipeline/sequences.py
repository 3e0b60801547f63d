"""Decodes one sequence into the values that are stored: float32 [C, L] of the configured shape.

The header of a .npy file is a Python literal, which numpy evaluates: that warns of some headers,
and hostile ones may be slow. Here it is searched for what describes an array of numbers; nothing
is evaluated, and no object is ever unpickled.
"""

import math
import re

import numpy as np

from pipeline.readers.entries import Refused
from pipeline.settings import DataConfig

MAX_HEADER_BYTES = 10_000  # as in numpy; the usual ones take 118

_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by version of the format
_DESCR = re.compile(rb"""["']descr["']\s*:\s*["']([^"']{1,40})["']""")
_ORDER = re.compile(rb"""["']fortran_order["']\s*:\s*(True|False)""")
_SHAPE = re.compile(rb"""["']shape["']\s*:\s*\(([\d\s,L]{0,200})\)""")  # Python 2 wrote 16L
_NUMBERS = re.compile(r"[<>|=]?(f[248]|[iu][1248])")


def decode_sequence(content: bytes | np.ndarray, data: DataConfig) -> np.ndarray:
    """Decodes one sequence of numbers; float32 of `data.sequence_shape`, C-contiguous.

    Args:
        content: a .npy file or an array, of [C, L], or [L] where C is 1.
        data: the shape that it must have.

    Raises:
        Refused: empty, truncated, undecodable, wrong_shape, or not_finite, also for what exceeds
            float32.
    """
    if isinstance(content, np.ndarray):
        _check(content.dtype.str, content.shape, data)
        values = content
    else:
        values = _read_npy(content, data)
    with np.errstate(over="ignore", invalid="ignore"):  # what became infinite is found below
        sequence = np.array(values.reshape(data.shape), np.float32, order="C")
    num_bad = sequence.size - int(np.isfinite(sequence).sum())
    if num_bad:
        raise Refused("not_finite", f"{num_bad} of {sequence.size} values are NaN or infinite")
    return sequence


def _read_npy(content: bytes, data: DataConfig) -> np.ndarray:
    if not content:
        raise Refused("empty", "there are no bytes in it")
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise Refused("undecodable", "it is no .npy file")
    if len(content) < 12:
        raise Refused("truncated", "it ends in the header")
    if content[6] not in _LENGTH_BYTES:
        raise Refused("undecodable", f"version {content[6]} of .npy is unknown")
    start = 8 + _LENGTH_BYTES[content[6]]
    end = start + int.from_bytes(content[8:start], "little")
    if end > len(content):
        raise Refused("truncated", "it ends in the header")
    if end - start > MAX_HEADER_BYTES:
        raise Refused("undecodable", f"a header of {end - start} bytes is too long")
    header = content[start:end]
    descr, order, shape = (found.search(header) for found in (_DESCR, _ORDER, _SHAPE))
    if descr is None or order is None or shape is None:
        raise Refused("undecodable", "its header describes no array of numbers")
    axes = tuple(int(axis) for axis in re.findall(rb"\d+", shape[1]))
    dtype = descr[1].decode("latin-1")
    _check(dtype, axes, data)
    num_bytes = math.prod(axes) * np.dtype(dtype).itemsize
    if end + num_bytes > len(content):
        raise Refused("truncated", f"it holds {len(content) - end} of {num_bytes} bytes of values")
    values = np.frombuffer(content, dtype, math.prod(axes), end)
    return values.reshape(axes, order="F" if order[1] == b"True" else "C")


def _check(dtype: str, shape: tuple[int, ...], data: DataConfig) -> None:
    if _NUMBERS.fullmatch(dtype) is None:
        raise Refused("undecodable", f"the values must be real numbers, got dtype {dtype!r}")
    if shape != data.shape and not (data.channels == 1 and shape == data.shape[1:]):
        raise Refused("wrong_shape", f"the shape must be {list(data.shape)}, got {list(shape)}")
