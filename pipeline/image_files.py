"""Opening image files that may be hostile: what they are, how large, and what is wrong with them.

Only the header is read here. What would keep a decoder busy, or fill the memory, out of proportion
to its pixels is refused before `images.py` decodes it.
"""

import contextlib
import ctypes
import io
import logging
import re
import struct
import warnings

from PIL import Image, PngImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as Tag
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.readers.entries import Refused
from pipeline.settings import DataConfig

MAX_JPEG_MARKERS = 10_000  # looked at one by one where there may be too many scans
MAX_JPEG_SCANS = 100  # each costs a pass over all pixels for ten bytes of file; usual are 10

_OPENERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),  # of the several pictures in an MPO this is the main one
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"BM", BmpImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"II+\0", TiffImageFile),  # BigTIFF
    (b"MM\0+", TiffImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
)
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # the end, or one that a length follows
_PILLOW = r"PIL\."
_QUIET = ("ignore", None, Warning, re.compile(_PILLOW), 0)

logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # a bad file is ours to tell of
with contextlib.suppress(OSError, AttributeError):  # linked otherwise, libtiff stays loud
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # it writes to standard error


def prepare_pillow(data: DataConfig) -> None:
    """Keeps Pillow's warnings in, its pixel limit above ours, and that of text in a PNG high.

    They are of the whole process and never taken back: entering and leaving
    `warnings.catch_warnings` for each image would mix up the filters of threads.
    """
    if _QUIET not in warnings.filters[:1]:
        warnings.filterwarnings("ignore", module=_PILLOW)
    if Image.MAX_IMAGE_PIXELS is not None and data.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = data.max_pixels
    # Colour profiles and what programs note are longer than 1 MiB; all together may be 64.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def open_image(content: bytes, data: DataConfig) -> ImageFile:
    """Reads the header. Not `Image.open`, which hides what is wrong and has a limit of its own."""
    if not content:
        raise Refused("empty", "there are no bytes in it")
    for magic, opener in _OPENERS:
        if content.startswith(magic):
            if opener is WebPImageFile:
                check_pixels(_webp_size(content), data)  # opening makes room for all pixels
            return opener(io.BytesIO(content))
    raise Refused("not_an_image", "it is no JPEG, PNG, WebP, BMP, TIFF or GIF file")


def _webp_size(content: bytes) -> tuple[int, int]:
    """The size of the canvas, in any of the three kinds of WebP."""
    kind, body = content[8:16], content[20:30].ljust(10, b"\0")
    if kind == b"WEBPVP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"WEBPVP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"WEBPVP8 ":
        width, height = struct.unpack("<2H", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise Refused("not_an_image", "it is a RIFF file, but no WebP image")


def check_pixels(size: tuple[int, int], data: DataConfig) -> None:
    width, height = size
    if width * height > data.max_pixels:
        raise Refused(
            "too_many_pixels",
            f"{width} x {height} pixels are too many, data.max_pixels is {data.max_pixels}",
        )


def has_more_frames(image: Image.Image) -> bool:
    """Whether the header, or for GIF the blocks after the first frame, tell of another."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # junk after the first frame of a GIF is no frame
        return False


def check_work(image: ImageFile, content: bytes, data: DataConfig) -> None:
    """Refuses what would keep a decoder busy out of proportion to its pixels."""
    if isinstance(image, JpegImageFile):
        assert image.fp is not None  # not decoded yet: it stands behind the head of the first scan
        of_all_layers = b"\xff\xda\0" + bytes((6 + 2 * image.layers, image.layers))
        head = image.fp.tell() - 2 * image.layers - 8
        has_more = "progressive" in image.info or not content.startswith(of_all_layers, head)
        if has_more and _has_too_many_scans(content):
            raise Refused("undecodable", f"it has more than {MAX_JPEG_SCANS} scans")
    elif isinstance(image, TiffImageFile):
        _check_tiff(image, content, data)
    elif isinstance(image, BmpImageFile) and image.width * image.height > 128 * len(content):
        # only run lengths could say so much, 255 pixels in two bytes, and they are decoded slowly
        raise Refused("truncated", f"{len(content)} bytes are too few for its pixels")


def _has_too_many_scans(content: bytes) -> bool:
    """Goes from marker to marker as libjpeg does, up to the end of the image.

    What follows that, or is in a segment, is no scan; nor is an end in a segment one.
    """
    if content.count(b"\xff\xda") <= MAX_JPEG_SCANS:
        return False
    start, count = 2, 0
    for _ in range(MAX_JPEG_MARKERS):
        marker = _JPEG_MARKER.search(content, start)
        if marker is None or marker[0] == b"\xff\xd9":
            return False
        count += marker[0] == b"\xff\xda"
        if count > MAX_JPEG_SCANS:
            return True
        body = marker.end()
        start = body + max(2, int.from_bytes(content[body : body + 2], "big"))
    return True


def _check_tiff(image: TiffImageFile, content: bytes, data: DataConfig) -> None:
    tags = image.tag_v2
    offsets, counts = tags.get(Tag.StripOffsets, ()), tags.get(Tag.StripByteCounts, ())
    if Tag.TileOffsets in tags:
        offsets, counts = tags[Tag.TileOffsets], tags.get(Tag.TileByteCounts, ())
        width, height = tags[Tag.TileWidth], tags[Tag.TileLength]
        across, down = -(-tags[Tag.ImageWidth] // width), -(-tags[Tag.ImageLength] // height)
        check_pixels((across * width, down * height), data)  # a tile may exceed the image by far
    if image.tile[0][0] == "libtiff":  # it does not say that the end is missing
        if any(at + size > len(content) for at, size in zip(offsets, counts, strict=False)):
            raise Refused("truncated", "its strips end behind the end of the file")
    elif len(image.tile) > 1:
        boxes = [box for _, box, *_ in image.tile if box is not None]
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
        if area > 8 * image.width * image.height:  # one for each of at most six planes is right
            raise Refused("undecodable", f"its {len(boxes)} tiles cover each other")


def ends_early(content: bytes, image: ImageFile | None, error: Exception) -> bool:
    """Whether the file ends before the image does, as far as that shows."""
    cut = (EOFError, IndexError, struct.error)
    if isinstance(error, cut) or isinstance(error.__cause__, cut):
        return True
    message = str(error)
    if "truncated" in message.lower() or "not enough image data" in message:
        return True
    if content.startswith(b"\xff\xd8\xff"):  # no scan before the end
        return message in ("cannot load this image", "not identified by this driver")
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-64:]
    if content.startswith(b"RIFF"):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if content.startswith((b"II*", b"MM\0*")) and image is None:
        order = "little" if content.startswith(b"II") else "big"
        directory = int.from_bytes(content[4:8], order)
        num_tags = int.from_bytes(content[directory : directory + 2], order)
        return directory + 2 + 12 * num_tags > len(content) or not num_tags
    return False


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
