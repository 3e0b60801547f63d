"""IDX files, the format of MNIST: images in one file, their labels in another."""

import struct
from collections.abc import Iterator

import numpy as np

from pipeline.readers.entries import MAX_FILE_BYTES, Entry, Item, Refusal, Refused
from pipeline.readers.streams import InputStream, Readable
from pipeline.settings import DataConfig

_UINT8 = 0x08
_CHANNELS = (1, 3, 4)  # grey, colour, and colour with transparency


def iter_idx(images: Readable, labels: Readable | None, data: DataConfig) -> Iterator[Entry]:
    """Yields the images of an IDX file with their labels.

    Where there is a file of labels, an image that it has none for is refused: one refusal of
    "labels" counts these. It counts 0 when there are more labels than images.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C]; read once, may be compressed.
        labels: uint8 [N]; read once, may be compressed. None: there are none.
        data: limits the size of the images.
    """
    stream = InputStream(images)
    try:
        count, shape = _read_images_header(stream, data)
    except Refused as refused:
        yield Refusal("", refused.reason, refused.detail, hides_more=True)
        return
    label_stream, num_labels, label_fault = None, 0, None
    if labels is not None:
        label_stream = InputStream(labels)
        num_labels, label_fault = _read_labels_header(label_stream, count)
    size, num_images, num_labelled = int(np.prod(shape)), 0, 0
    for index in range(count):
        content = stream.read(size)
        if len(content) < size:
            break
        num_images += 1
        label = None
        if label_stream is not None:
            value = label_stream.read(1) if index < num_labels else b""
            if not value:
                continue
            label = value[0]
            num_labelled += 1
        pixels = np.frombuffer(content, np.uint8).reshape(shape)
        yield Item(f"{index:08d}", pixels, label)
    if num_images < count:
        detail = f"{stream.fault or 'the file ends'} after {num_images:,} of {count:,} images"
        yield Refusal("", "unreadable_tail", detail, count - num_images)
    elif (rest := stream.skip_rest()) or stream.fault is not None:
        detail = f"there are {rest:,} bytes more after the {count:,} images"
        yield Refusal("", "unreadable_tail", stream.fault or detail, max(1, rest // size))
    if label_stream is not None:
        if label_fault is None and num_labelled < num_images:
            label_fault = f"{label_stream.fault or 'the file ends'} after {num_labelled:,} labels"
        if label_fault is not None:
            yield Refusal("labels", "label_invalid", label_fault, num_images - num_labelled)


def _read_images_header(stream: InputStream, data: DataConfig) -> tuple[int, tuple[int, ...]]:
    """N, and the shape of an image."""
    count, *shape = _read_header(stream, "images", (3, 4))
    height, width, channels = (*shape, 1)[:3]
    if not 1 <= height * width <= data.max_pixels:
        detail = f"images of {height:,} x {width:,} pixels; 1 to {data.max_pixels:,} are read"
        raise Refused("unreadable_shard", detail)
    if channels not in _CHANNELS or height * width * channels > MAX_FILE_BYTES:
        detail = f"images of {height:,} x {width:,} x {channels:,} values are not read"
        raise Refused("unreadable_shard", detail)
    return count, tuple(shape)


def _read_labels_header(stream: InputStream, count: int) -> tuple[int, str | None]:
    """How many labels there are, and what is wrong with that."""
    try:
        (num_labels,) = _read_header(stream, "labels", (1,))
    except Refused as refused:
        return 0, refused.detail
    if num_labels != count:
        return num_labels, f"there are {num_labels:,} labels for {count:,} images"
    return num_labels, None


def _read_header(stream: InputStream, kind: str, num_axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, after a magic number that tells the type of the values and the axes."""
    magic = stream.read(4)
    if not magic and stream.fault is None:
        raise Refused("empty", f"the file of {kind} is empty")
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UINT8 or magic[3] not in num_axes:
        detail = stream.fault or f"it begins with {magic.hex()}"
        raise Refused("unreadable_shard", f"no IDX file of {kind} as bytes: {detail}")
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise Refused("unreadable_shard", f"the header of the {kind} is cut short")
    return struct.unpack(f">{magic[3]}I", sizes)
