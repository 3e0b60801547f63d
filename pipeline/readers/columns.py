"""The columns of a Parquet file: which hold images, sequences and labels, and their values."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from pipeline.readers.entries import MAX_FILE_BYTES, Label, MismatchError, Refused
from pipeline.readers.labels import parse_label
from pipeline.readers.names import show
from pipeline.settings import LABEL_FIELD, DataConfig


def find_content(schema: pa.Schema, data: DataConfig) -> str:
    """The name of the column with the images, or the sequences.

    Raises:
        MismatchError: the config names none, or none can be told from the others.
    """
    usual, holds = ("sequence", _is_sequence) if data.is_sequence else ("image", _is_image)
    fitting = [field.name for field in schema if holds(field.type)]
    wanted = data.content_field
    if wanted is None:
        wanted = usual if usual in fitting else fitting[0] if len(fitting) == 1 else None
    if wanted is not None and fitting.count(wanted) == 1 and schema.names.count(wanted) == 1:
        return wanted
    kind = "sequences" if data.is_sequence else "images"
    if wanted is not None:
        fault = f"has no column {show(wanted, 100)} with {kind}"
    else:
        fault = f"has {len(fitting) or 'no'} columns that could hold the {kind}"
    held = ", ".join(f"{show(field.name, 100)} ({show(str(field.type), 100)})" for field in schema)
    holding = "lists of numbers" if data.is_sequence else "encoded images"
    raise MismatchError(
        f"{fault}; it has {show(held, 1000)}",
        f"Set data.content_field to one that holds {holding}.",
    )


def find_label(schema: pa.Schema, content: str, data: DataConfig) -> str | None:
    """The name of the column with the labels; None where there is none.

    Raises:
        MismatchError: the config names one that is not there, or it holds something that is no
            class.
    """
    name = data.label_field
    if not name or (name == LABEL_FIELD and (name not in schema.names or name == content)):
        return None
    if name not in schema.names or name == content:
        held = ", ".join(show(other, 100) for other in schema.names if other != content)
        raise MismatchError(
            f"has no column {show(name, 100)} of labels; beside {show(content, 100)} it has "
            f"{show(held, 1000) or 'none'}",
            'Set data.label_field to one that it has, or to "" where none is to be read.',
        )
    kind = schema.field(name).type if schema.names.count(name) == 1 else "several of that name"
    if not isinstance(kind, str) and _is_label(kind):
        return name
    raise MismatchError(
        f"has in its column {show(name, 100)} no classes but {show(str(kind), 100)}",
        'Set data.label_field to a column of whole numbers or text, or to "" where none is to be '
        "read.",
    )


def leaf_of(field: pa.Field) -> str:
    """The part of a column of images that is read: Hugging Face keeps the path beside the bytes."""
    return f"{field.name}.bytes" if pt.is_struct(field.type) else field.name


def image_at(column: pa.Array, row: int) -> bytes:
    """The encoded image of a row.

    Raises:
        Refused: there is none, or it is too large.
    """
    absent = "the row is null"
    if pt.is_struct(column.type):
        (column,) = column.flatten()
        absent = "its bytes are not in the file"
    value: Any = column[row]
    if not value.is_valid:
        raise Refused("empty", absent)
    size = value.as_buffer().size
    if size > MAX_FILE_BYTES:
        raise Refused("too_large", f"{size:,} bytes are more than {MAX_FILE_BYTES:,}")
    return value.as_py()


def sequence_at(column: pa.Array, row: int, data: DataConfig) -> np.ndarray:
    """The sequence of a row, in the shape it has there; one of C x L values becomes [C, L].

    Raises:
        Refused: there is none, or its parts do not fit together.
    """
    tensor = column.type if isinstance(column.type, pa.FixedShapeTensorType) else None
    value: Any = (column.storage if isinstance(column, pa.ExtensionArray) else column)[row]
    if not value.is_valid:
        raise Refused("empty", "the row is null")
    sequence = _array_of(value.values, data)
    if tensor is not None:
        sequence = sequence.reshape(tensor.shape)
        if tensor.permutation is not None:
            sequence = sequence.transpose(tensor.permutation)
    if sequence.shape == (data.shape[0] * data.shape[1],):
        return sequence.reshape(data.shape)
    return sequence


def label_at(column: pa.Array, row: int) -> Label:
    """The label of a row.

    Raises:
        Refused: it is no class.
    """
    try:
        return parse_label(column[row].as_py())
    except UnicodeDecodeError as error:
        raise Refused("label_invalid", "the label is no UTF-8 text") from error


def _array_of(values: pa.Array, data: DataConfig) -> np.ndarray:
    if not _is_list(values.type):
        return values.to_numpy(zero_copy_only=False)  # null becomes NaN
    channels = data.channels
    lengths = {len(row.values) for row in values if row.is_valid} if len(values) == channels else ()
    if len(values) != channels or values.null_count or len(lengths) != 1:
        detail = f"it has {len(values):,} channels, of lengths {sorted(lengths)[:5]}"
        raise Refused("wrong_shape", f"{detail}; [{channels}, {data.shape[1]}] is read")
    return np.stack([_array_of(row.values, data) for row in values])


def _is_image(kind: pa.DataType) -> bool:
    if pt.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pt.is_binary(kind) or pt.is_large_binary(kind)


def _is_sequence(kind: pa.DataType) -> bool:
    """Whether it is numbers in one list or two."""
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    depth = 0
    while _is_list(kind) and depth < 2:
        kind, depth = kind.value_type, depth + 1
    return depth > 0 and (pt.is_integer(kind) or pt.is_floating(kind))


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_label(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    tests = (pt.is_integer, pt.is_string, pt.is_large_string, pt.is_binary, pt.is_null)
    return any(test(kind) for test in tests)
