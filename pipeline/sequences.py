"""Decodes one sequence into the values that are stored: float32 [C, L] of the configured shape.

How an npy file is read is in `readers/npy_headers.py`.
"""

import io

import numpy as np

from pipeline.readers.entries import Refused
from pipeline.readers.npy_headers import check_end, check_numbers, read_header, read_values
from pipeline.readers.streams import InputStream
from pipeline.settings import DataConfig


def decode_sequence(content: bytes | np.ndarray, data: DataConfig) -> np.ndarray:
    """Decodes one sequence of numbers; float32 of `data.sequence_shape`, C-contiguous.

    Args:
        content: a .npy file, which may be compressed, or an array, of [C, L], or [L] where C is 1.
        data: the shape that it must have.

    Raises:
        Refused: empty, truncated, undecodable, wrong_shape, or not_finite, also for what exceeds
            float32.
    """
    if isinstance(content, np.ndarray):
        _check(content.dtype, content.shape, data)
        values = content
    else:
        stream = InputStream(io.BytesIO(content))
        header = read_header(stream)
        _check(header.dtype, header.shape, data)
        values = read_values(stream, header)
        check_end(stream)
    with np.errstate(over="ignore", invalid="ignore"):  # what became infinite is found below
        sequence = np.array(values.reshape(data.shape), np.float32, order="C")
    num_bad = sequence.size - int(np.isfinite(sequence).sum())
    if num_bad:
        raise Refused("not_finite", f"{num_bad} of {sequence.size} values are NaN or infinite")
    return sequence


def _check(dtype: np.dtype, shape: tuple[int, ...], data: DataConfig) -> None:
    check_numbers(dtype)
    if shape != data.shape and not (data.channels == 1 and shape == data.shape[1:]):
        raise Refused("wrong_shape", f"the shape must be {list(data.shape)}, got {list(shape)}")
