"""Ordinary JPEGs, decoded without what Pillow does to open and load a file.

Of an image of 256 x 256 that is a tenth of the time. A head that is taken says nothing but what
every encoder writes: no orientation, no profile, one scan of all layers. The pixels are those of
Pillow's `JpegImageFile`, which would give the same decoder the same bytes at once; whatever is
longer, unusual or damaged is left to it, and to the checks of `image_files.py`.
"""

import functools
from typing import Literal, NamedTuple

from PIL import Image, ImageFile

from pipeline.decoder_rows import prepare_rows

# Pillow gives its decoder so much at once. How libjpeg reads damaged data depends on where a block
# ends, and of a longer file the head is a small part anyway.
MAX_BYTES = ImageFile.MAXBLOCK
PIXELS_PER_BYTE = 128  # more are a lie or one colour: no room is made for them before they are read

_QUANTISATION, _HUFFMAN, _RESTARTS, _COMMENT, _JFIF = 0xDB, 0xC4, 0xDD, 0xFE, 0xE0
_BASELINE, _SCAN = 0xC0, 0xDA
_TABLE_BYTES = 65  # a byte with its number, 64 values of 8 bits
_MODES: dict[int, Literal["L", "RGB"]] = {1: "L", 3: "RGB"}


class PlainHead(NamedTuple):
    """What the head of an ordinary JPEG says."""

    size: tuple[int, int]  # width, height
    mode: Literal["L", "RGB"]


def read_plain_head(content: bytes) -> PlainHead | None:
    """Reads the segments before the scan; None where any is unusual, or it is no JPEG."""
    if len(content) > MAX_BYTES or not content.startswith(b"\xff\xd8\xff"):
        return None
    head, start, end = None, 2, len(content)
    while start + 4 <= end and content[start] == 0xFF:
        marker = content[start + 1]
        body, size = start + 4, content[start + 2] << 8 | content[start + 3]
        start += 2 + size
        if start > end:
            return None
        if marker == _SCAN:
            return head if head is not None and _is_plain(content, body, head) else None
        if marker == _BASELINE:
            if head is not None or (head := _read_frame(content, body, size)) is None:
                return None
        elif marker == _QUANTISATION:
            is_whole = (size - 2) % _TABLE_BYTES == 0
            if not is_whole or max(content[body:start:_TABLE_BYTES], default=0) > 3:
                return None
        elif marker == _JFIF:
            if size < 16 or not content.startswith(b"JFIF\0", body):
                return None
        elif marker not in (_HUFFMAN, _RESTARTS, _COMMENT):
            return None
    return None


def _read_frame(content: bytes, body: int, size: int) -> PlainHead | None:
    if size < 8:
        return None
    depth, layers = content[body], content[body + 5]
    height = content[body + 1] << 8 | content[body + 2]
    width = content[body + 3] << 8 | content[body + 4]
    if depth != 8 or layers not in _MODES or size != 8 + 3 * layers or not (width and height):
        return None
    return PlainHead((width, height), _MODES[layers])


def _is_plain(content: bytes, body: int, head: PlainHead) -> bool:
    """Whether the first scan holds all layers, so that no other follows, and could all pixels."""
    width, height = head.size
    layers = 1 if head.mode == "L" else 3
    all_layers = bytes((0, 6 + 2 * layers, layers))
    is_likely = width * height <= PIXELS_PER_BYTE * len(content)
    return is_likely and content.startswith(all_layers, body - 2)


@functools.lru_cache(maxsize=1024)  # most images are of the same few sizes
def draft_scale(size: tuple[int, int], least: tuple[int, int]) -> int:
    """How many times smaller libjpeg decodes at once, as `draft(None, least)` of Pillow chooses."""
    times = min(size[0] // least[0], size[1] // least[1])
    return next((scale for scale in (8, 4, 2) if times >= scale), 1)


def decode_plain(content: bytes, head: PlainHead, scale: int) -> Image.Image | None:
    """Decodes the pixels at 1/`scale` of the size; None where they are damaged."""
    width, height = head.size
    width, height = -(-width // scale), -(-height // scale)
    if head.mode == "RGB":
        prepare_rows(width)
    try:
        image = Image.new(head.mode, (width, height), None)  # every pixel is written, or it raises
        image.frombytes(content, "jpeg", head.mode, "", scale, 0)
        return image
    except Exception:  # what is wrong, and how it is told, is for who reads it with care
        return None
