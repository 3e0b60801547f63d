"""Decodes one image into the pixels that are stored: uint8 [C, H, W] of the configured size.

The same bytes and settings give the same pixels. Content may be hostile: whatever is wrong with
it ends as `Refused`, and what it makes a decoder do is bounded by `data.max_pixels`, at up to 20
bytes of memory each. Which files are read, and what becomes of a refusal, is in `readers/` and
`preprocess.py`. Embedded profiles of grey and RGB images are deliberately not applied, only those
of CMYK.

With `data.jpeg_draft` a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves
DRAFT_GAP times the size wanted. The mean absolute difference from the full decode is then at most
2.5 levels of 255 in natural images and 6.5 in text and noise, and 99.9 % of the values differ by
at most 30: less than two filters of `data.resample` do. Measured for each filter on power-law,
dead-leaves, text and noise images, at qualities 75 and 95, with 4:2:0 and 4:4:4.
"""

import functools
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.ExifTags import Base as Tag
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.decoder_rows import prepare_rows
from pipeline.image_files import (
    check_pixels,
    check_work,
    ends_early,
    has_more_frames,
    one_line,
    open_image,
    prepare_pillow,
)
from pipeline.plain_jpegs import decode_plain, draft_scale, read_plain_head
from pipeline.readers.entries import Refused
from pipeline.settings import DataConfig

DRAFT_GAP = {"area": 6, "bicubic": 2, "lanczos": 2}  # area takes pixels whole, so needs more
MAX_SIDE_PX = 1 << 16  # weights of a filter take 48 bytes a pixel of the side: reduce longer ones

_RESAMPLE = {
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TURNS = {  # by EXIF orientation: how to turn, and whether x and y then run backwards
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}


class Decoded(NamedTuple):
    """The pixels of an image, as they are stored."""

    pixels: np.ndarray  # uint8 [C, H, W], C-contiguous
    is_animated: bool  # more frames than the first, which is the one used


class _View(NamedTuple):
    """Where an image of `width` x `height` lies in decoded pixels: `scale` of it make one."""

    width: int
    height: int
    scale: float = 1
    left: float = 0
    top: float = 0


class _Place(NamedTuple):
    """What becomes of decoded pixels: left, upper, right and lower edges, width and height."""

    whole: tuple[int, int, int, int]  # is cut out
    box: tuple[float, float, float, float]  # of that is resized
    target: tuple[int, int]


def decode_image(content: bytes | np.ndarray, data: DataConfig) -> Decoded | None:
    """Decodes one image, turns it upright, flattens, crops and resizes it.

    Args:
        content: a JPEG, PNG, WebP, BMP, TIFF or GIF file, or pixels uint8 [H, W] or [H, W, C]
            with C = 1, 3 or 4 (RGBA).
        data: the size, mode and fit to arrive at, and the limits.

    Returns:
        The pixels; None where the shorter side is below `data.min_resolution_px`.

    Raises:
        Refused: empty, truncated, not_an_image, undecodable or too_many_pixels.
    """
    prepare_pillow(data)
    if isinstance(content, np.ndarray):
        pixels = _from_array(content)
        if _is_too_small(pixels.size, data):
            return None
        return Decoded(_fit(pixels, _View(*pixels.size), data), is_animated=False)
    image = None
    try:
        head = read_plain_head(content)
        if head is not None:
            if _is_too_small(head.size, data):
                return None
            least = _least_draft(head.size, data)
            scale = draft_scale(head.size, least) if data.jpeg_draft else 1
            plain = decode_plain(content, head, scale)
            if plain is not None:
                return Decoded(_fit(plain, _View(*head.size, scale), data), is_animated=False)
        image = open_image(content, data)
        if _is_too_small(image.size, data):
            return None
        is_animated = has_more_frames(image)
        check_work(image, content, data)
        upright, view = _load_upright(image, content, data)
        return Decoded(_fit(upright, view, data), is_animated)
    except Refused:
        raise
    except Image.DecompressionBombError as error:  # a frame beyond the edge of its GIF
        raise Refused("too_many_pixels", one_line(error)) from error
    except Exception as error:  # decoders raise about anything at hostile bytes
        reason = "truncated" if ends_early(content, image, error) else "undecodable"
        raise Refused(reason, one_line(error)) from error


def _is_too_small(size: tuple[int, int], data: DataConfig) -> bool:
    """Whether the config leaves out images of this size. Refused: it has too many pixels."""
    check_pixels(size, data)
    return min(size) < data.min_resolution_px


def _from_array(pixels: np.ndarray) -> Image.Image:
    shape = list(pixels.shape)
    if pixels.dtype != np.uint8 or not (len(shape) == 2 or shape[2:] in ([1], [3], [4])):
        raise Refused(
            "undecodable",
            f"pixels must be uint8 [H, W] or [H, W, 1, 3 or 4], got {pixels.dtype} {shape}",
        )
    if not pixels.size:
        raise Refused("empty", f"there are no pixels in {shape}")
    return Image.fromarray(pixels[..., 0] if shape[2:] == [1] else pixels)


def _load_upright(image: ImageFile, content: bytes, data: DataConfig) -> tuple[Image.Image, _View]:
    """Decodes the pixels, in 8 bits, and turns them as EXIF says."""
    width, height = image.size
    scale = _draft(image, data)
    if isinstance(image, JpegImageFile) and image.mode == "RGB":
        prepare_rows(image.width)
    image.load()
    orientation = _orientation(image)
    upright = _to_8_bits(image, content)
    if orientation not in _TURNS:
        return upright, _View(width, height, scale)
    method, is_x_reversed, is_y_reversed = _TURNS[orientation]
    upright = upright.transpose(method)
    if orientation >= 5:
        width, height = height, width
    # a draft ends with a part of a pixel, which a turn may bring to the beginning
    left = upright.width - width / scale if is_x_reversed else 0
    top = upright.height - height / scale if is_y_reversed else 0
    return upright, _View(width, height, scale, left, top)


def _draft(image: ImageFile, data: DataConfig) -> float:
    """Has a large JPEG decoded at a fraction of its size; how many times smaller."""
    width = image.width
    drafted = image.draft(None, _least_draft(image.size, data)) if data.jpeg_draft else None
    return 1 if drafted is None else width / drafted[1][2]


def _least_draft(size: tuple[int, int], data: DataConfig) -> tuple[int, int]:
    """The width and height below which a draft of a JPEG of `size` must not be."""
    enough = DRAFT_GAP[data.resample] * data.shape[-1]
    if data.fit == "pad":  # there the longer side becomes the size
        return (enough, 1) if size[0] > size[1] else (1, enough)
    return enough, enough


def _orientation(image: ImageFile) -> int:
    """That of EXIF; 1, upright, where it has none that can be read. Pillow turns TIFF itself."""
    if isinstance(image, JpegImageFile) and not image.info.keys() & {"exif", "xmp"}:
        return 1  # most JPEGs; looking further takes as long as opening one
    try:
        return image.getexif().get(Tag.Orientation, 1)
    except Exception:
        return 1


def _to_8_bits(image: ImageFile, content: bytes) -> Image.Image:
    """Scales 16-bit grey, which Pillow would clip, and PNG's transparent value to the pixels."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values, levels = np.asarray(image), 65535
        if isinstance(image, TiffImageFile):
            levels = 4095 if image.tag_v2.get(Tag.BitsPerSample) == (12,) else levels
            if image.tag_v2.get(Tag.PhotometricInterpretation) == 0:  # white is zero
                values = levels - values
        grey = Image.fromarray(_levels_to_8_bits(levels)[values])
        if transparent is not None:
            alpha = np.where(values == transparent, np.uint8(0), np.uint8(255))
            grey.putalpha(Image.fromarray(alpha))
        return grey
    if image.mode in ("I", "F"):
        raise Refused("undecodable", f"the range of its pixels is unknown (mode {image.mode})")
    if transparent is not None and image.format == "PNG":
        depth = content[24]
        if image.mode == "L" and depth < 8:
            image.info["transparency"] = transparent * (255 // (2**depth - 1))
        elif image.mode == "RGB" and depth == 16:
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


@functools.cache
def _levels_to_8_bits(levels: int) -> np.ndarray:
    """For 0 to `levels` the nearest of 256 values."""
    return ((np.arange(levels + 1) * 255 + levels // 2) // levels).astype(np.uint8)


def _fit(image: Image.Image, view: _View, data: DataConfig) -> np.ndarray:
    """Takes the part that is wanted, flattens, resizes and pads it; uint8 [C, H, W]."""
    size = data.shape[-1]
    whole, box, target = _place(view, data.fit, size)
    if whole != (0, 0, *image.size):
        image = image.crop(whole)
    image = _flatten(image, data)
    if image.size != target:
        gap = 3.0 if max(image.size) > MAX_SIDE_PX else None
        image = image.resize(target, _RESAMPLE[data.resample], box, reducing_gap=gap)
    if target != (size, size):
        canvas = Image.new(data.mode, (size, size), data.background)
        canvas.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
        image = canvas
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(size, size, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@functools.lru_cache(maxsize=1024)  # most images are of the same few sizes
def _place(view: _View, fit: str, size: int) -> _Place:
    """Which part of the decoded pixels is resized to what."""
    left, top, width, height = 0, 0, view.width, view.height
    target = (size, size)
    if fit == "crop":
        side = min(width, height)
        left, top, width, height = (width - side) // 2, (height - side) // 2, side, side
    elif fit == "pad":
        longer = max(width, height)
        target = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
    x0, y0 = view.left + left / view.scale, view.top + top / view.scale
    x1, y1 = x0 + width / view.scale, y0 + height / view.scale
    whole = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    box = (x0 - whole[0], y0 - whole[1], x1 - whole[0], y1 - whole[1])
    return _Place(whole, box, target)


def _flatten(image: Image.Image, data: DataConfig) -> Image.Image:
    """In `data.mode`, over the background where the image lets it through."""
    if image.mode == data.mode and "transparency" not in image.info:
        return image
    if image.mode == "CMYK":
        transform = _cmyk_to_srgb(image.info.get("icc_profile"))
        image = image if transform is None else transform.apply(image)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        below = Image.new("RGBA", image.size, data.background)
        image = Image.alpha_composite(below, image.convert("RGBA"))
    return image if image.mode == data.mode else image.convert(data.mode)


@functools.lru_cache(maxsize=8)
def _cmyk_to_srgb(profile: bytes | None) -> ImageCms.ImageCmsTransform | None:
    """What an embedded profile asks for; None where there is none that works."""
    if profile is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
    except Exception:  # damaged, or of other colours
        return None
