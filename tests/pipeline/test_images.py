import functools
import io
import logging
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline import images
from pipeline.images import decode_image
from pipeline.readers.entries import Refused
from pipeline.settings import DataConfig

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
TRANSPOSE = Image.Transpose
STORED = {  # what makes the stored picture of an upright one, by EXIF orientation
    1: None,
    2: TRANSPOSE.FLIP_LEFT_RIGHT,
    3: TRANSPOSE.ROTATE_180,
    4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE,
    6: TRANSPOSE.ROTATE_90,
    7: TRANSPOSE.TRANSVERSE,
    8: TRANSPOSE.ROTATE_270,
}


def settings(**changes: Any) -> DataConfig:
    return DataConfig(**{"sources": ("x",), "resolution": 16} | changes)


def decode(content: bytes | np.ndarray, **changes: Any) -> np.ndarray:
    decoded = decode_image(content, settings(**changes))
    assert decoded is not None
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    return decoded.pixels


def refusal(content: bytes | np.ndarray, **changes: Any) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        decode_image(content, settings(**changes))
    assert caught.value.detail.isprintable()
    return caught.value.reason, caught.value.detail


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, **chunks: bytes) -> bytes:
    """A PNG by hand: Pillow writes not all that others do."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    row = len(pixels) // height
    rows = b"".join(b"\0" + pixels[y * row :][:row] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *((kind.encode(), body) for kind, body in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(body)) + body


def tiff(pixels: bytes, **changes: tuple[int, ...] | None) -> bytes:
    """A TIFF by hand: grey, 16 x 16, all in one strip, but for what is changed."""
    tags: dict[str, tuple[int, ...] | None] = {
        "width": (16,), "height": (16,), "bits": (8,), "compression": (1,), "photometric": (1,),
        "offsets": (8,), "samples": (1,), "rows": (16,), "counts": (len(pixels),),
        "tile_width": None, "tile_height": None, "tile_offsets": None, "tile_counts": None,
        "extra_samples": None, "sample_format": None,
    }  # fmt: skip
    numbers = (256, 257, 258, 259, 262, 273, 277, 278, 279, 322, 323, 324, 325, 338, 339)
    entries, beyond = [], b""
    values = [(n, v) for n, v in zip(numbers, (tags | changes).values(), strict=True) if v]
    directory = 8 + len(pixels)
    for number, value in values:
        body = struct.pack(f"<{len(value)}I", *value)
        if len(value) > 1:
            at = directory + 2 + 12 * len(values) + 4 + len(beyond)
            body, beyond = struct.pack("<I", at), beyond + body
        entries.append(struct.pack("<HHI", number, 4, len(value)) + body)
    count = struct.pack("<H", len(entries))
    return (
        b"II*\0"
        + struct.pack("<I", directory)
        + pixels
        + count
        + b"".join(entries)
        + bytes(4)
        + beyond
    )


def cmyk_profile(ink: tuple[int, int, int]) -> bytes:
    """An ICC profile in which cyan looks like this, in bytes of CIELAB, and yellow like paper."""
    corners = ([(255, 128, 128), (0, 128, 128)] * 4) + [ink, (0, 128, 128)] * 4  # C, M, Y, K
    identity = [65536 if k % 4 == 0 else 0 for k in range(9)]
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + struct.pack(">9i", *identity)
    table += bytes(range(256)) * 4 + bytes(v for corner in corners for v in corner)
    table += bytes(range(256)) * 3
    head = bytes(4) + struct.pack(">I", 0x02400000) + b"prtrCMYKLab " + bytes(12) + b"acsp"
    head = head.ljust(64, b"\0") + struct.pack(">4x3i", 63190, 65536, 54061)
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    content = bytes(4) + head.ljust(124, b"\0") + tags + table
    return struct.pack(">I", len(content)) + content[4:]


def crop_and_resize(content: bytes, data: DataConfig) -> np.ndarray:
    """What version 1 of the shards held."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert(data.mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != data.resolution:
        image = image.resize((data.shape[-1], data.shape[-1]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# --- sizes and modes


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("stored", ["L", "RGB", "1"])
@pytest.mark.parametrize("size", [(16, 16), (41, 20), (23, 60), (7, 9), (300, 16)])
def test_png_gives_the_same_bytes_as_before(mode: str, stored: str, size: tuple[int, int]) -> None:
    content = encode(picture(*size).convert(stored))
    assert np.array_equal(decode(content, mode=mode), crop_and_resize(content, settings(mode=mode)))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate", "tiffinfo": {322: 16, 323: 16}}),
    ],
)
def test_an_image_of_the_right_size_keeps_its_pixels(form: str, options: dict[str, Any]) -> None:
    image = picture()
    assert np.array_equal(
        decode(encode(image, form, **options)).transpose(1, 2, 0), np.asarray(image)
    )


def test_a_small_jpeg_is_decoded_as_pillow_does() -> None:
    content = encode(picture(40, 20), "JPEG")
    assert np.array_equal(decode(content), crop_and_resize(content, settings()))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_becomes_its_colours(form: str) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette((*WHITE, 10, 200, 30))
    assert decode(encode(image, form))[:, 3, 3].tolist() == [10, 200, 30]


def test_stretch_takes_all_of_the_image() -> None:
    image = picture(40, 24)
    expected = image.resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(
        decode(encode(image), fit="stretch").transpose(1, 2, 0), np.asarray(expected)
    )


def test_crop_takes_the_middle_and_rounds_to_the_left() -> None:
    image = picture(21, 16)
    assert np.array_equal(decode(encode(image)).transpose(1, 2, 0), np.asarray(image)[:, 2:18])


def test_pad_keeps_the_aspect_in_the_middle_of_the_background() -> None:
    image = Image.new("RGB", (32, 14), RED)
    pixels = decode(encode(image), fit="pad", background="#102030").transpose(1, 2, 0)
    assert np.array_equal(pixels[4:11], np.broadcast_to(RED, (7, 16, 3)))
    assert np.array_equal(pixels[:4], np.broadcast_to((16, 32, 48), (4, 16, 3)))
    assert np.array_equal(pixels[11:], np.broadcast_to((16, 32, 48), (5, 16, 3)))


def test_pad_shows_a_line_of_an_image_that_is_one() -> None:
    pixels = decode(encode(Image.new("RGB", (1000, 1))), fit="pad")
    assert (pixels == 0).sum() == 3 * 16


def test_pad_of_grey_images_is_the_luma_of_the_background() -> None:
    pixels = decode(encode(Image.new("L", (16, 8))), fit="pad", mode="L", background="#ff0000")
    assert pixels[0, 0, 0] == 76
    assert pixels[0, 8, 0] == 0


@pytest.mark.parametrize(
    ("resample", "theirs"), [("area", "BOX"), ("bicubic", "BICUBIC"), ("lanczos", "LANCZOS")]
)
def test_filters_are_those_of_pillow(resample: str, theirs: str) -> None:
    image = picture(50, 50)
    expected = image.resize((16, 16), Image.Resampling[theirs])
    assert np.array_equal(
        decode(encode(image), resample=resample).transpose(1, 2, 0), np.asarray(expected)
    )


def test_a_very_long_image_is_reduced_before_it_is_resized() -> None:
    image = picture(70_000, 2)
    expected = image.resize((16, 16), Image.Resampling.LANCZOS, reducing_gap=3.0)
    decoded = decode(encode(image), fit="stretch").transpose(1, 2, 0)
    assert np.array_equal(decoded, np.asarray(expected))
    assert not np.array_equal(decoded, np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)))


def test_images_too_small_are_left_out_before_they_are_decoded() -> None:
    content = encode(picture(40, 20))
    assert decode_image(content[:60], settings(min_resolution_px=21)) is None
    assert decode_image(content, settings(min_resolution_px=20)) is not None
    assert decode_image(np.zeros((8, 30), np.uint8), settings(min_resolution_px=9)) is None


# --- pixels that come decoded


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (16, 16, 3)])
def test_arrays_are_taken_as_they_are(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.broadcast_to(pixels.reshape(16, 16, -1), (16, 16, 3))
    assert np.array_equal(decode(pixels).transpose(1, 2, 0), np.asarray(expected))
    assert np.array_equal(decode(np.asfortranarray(pixels)), decode(pixels))


def test_the_fourth_channel_of_an_array_is_opacity() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8, :, 3] = 255
    decoded = decode(pixels, background="#102030")
    assert decoded[:, 0, 0].tolist() == [0, 0, 0]
    assert decoded[:, 8, 0].tolist() == [16, 32, 48]


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((4, 4, 2), np.uint8), "undecodable"),
        (np.zeros((1, 4, 4, 3), np.uint8), "undecodable"),
        (np.zeros(4, np.uint8), "undecodable"),
        (np.zeros((), np.uint8), "undecodable"),
        (np.zeros((4, 4)), "undecodable"),
        (np.zeros((0, 4), np.uint8), "empty"),
        (np.zeros((20, 20), np.uint8), "too_many_pixels"),
    ],
)
def test_arrays_that_are_no_image_are_refused(pixels: np.ndarray, reason: str) -> None:
    assert refusal(pixels, max_pixels=399)[0] == reason


# --- orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_images_are_turned_upright(form: str, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), WHITE)
    for at, colour in (((0, 0), RED), ((24, 0), GREEN), ((0, 16), BLUE)):
        upright.paste(colour, (*at, at[0] + 24, at[1] + 16))
    method = STORED[orientation]
    stored = upright if method is None else upright.transpose(method)
    content = encode(stored, form, exif=exif(orientation), quality=95)
    pixels = decode(content, resolution=32).transpose(1, 2, 0)
    corners = np.stack([pixels[4, 4], pixels[4, 27], pixels[27, 4], pixels[27, 27]])
    assert corners == pytest.approx(np.array([RED, GREEN, BLUE, WHITE]), abs=8)


def test_the_orientation_may_stand_in_xmp() -> None:
    image = Image.new("RGB", (16, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    pixels = decode(encode(image, "WEBP", lossless=True, xmp=xmp))
    assert pixels[:, 0, 0].tolist() == list(BLUE)


@pytest.mark.parametrize("junk", [b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_an_image_with_unreadable_exif_stays_as_it_is(junk: bytes) -> None:
    image = picture()
    assert np.array_equal(decode(encode(image, exif=junk)).transpose(1, 2, 0), np.asarray(image))


# --- modes


@pytest.mark.parametrize("form", ["PNG", "TIFF", "big TIFF", "LZW"])
def test_grey_of_16_bits_is_scaled_and_rounded(form: str) -> None:
    values = (np.arange(256) * 256 + 129).astype(np.uint16).reshape(16, 16)
    if form == "big TIFF":
        content = encode(Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes()), "TIFF")
    else:
        options = {"compression": "tiff_lzw"} if form == "LZW" else {}
        content = encode(Image.fromarray(values), "TIFF" if form == "LZW" else form, **options)
    assert np.array_equal(decode(content, mode="L")[0], np.rint(values / 257))


def test_a_tiff_of_12_bits_is_scaled_to_all_of_8() -> None:
    packed = bytes.fromhex("fff000") * 128  # 4095, 0
    assert decode(tiff(packed, bits=(12,)), mode="L")[0, 0].tolist() == [255, 0] * 8


def test_white_may_be_zero_in_16_bits() -> None:
    values = np.full((16, 16), 65535 - 257 * 9, "<u2")
    assert np.all(decode(tiff(values.tobytes(), bits=(16,), photometric=(0,)), mode="L") == 9)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.float32])
def test_pixels_of_unknown_range_are_refused(dtype: type) -> None:
    sample_format = {"i": 2, "u": 1, "f": 3}[np.dtype(dtype).kind]
    values = np.ones((16, 16), dtype)
    content = tiff(values.tobytes(), bits=(8 * values.itemsize,), sample_format=(sample_format,))
    reason, detail = refusal(content)
    assert reason == "undecodable"
    assert "range of its pixels" in detail


def test_colours_of_16_bits_keep_the_upper_eight() -> None:
    content = png(1, 1, 16, 2, struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF))
    assert decode(content, resolution=1)[:, 0, 0].tolist() == [0x12, 0x80, 0xFF]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("stored", ["RGBA", "LA"])
def test_what_is_transparent_shows_the_background(form: str, stored: str) -> None:
    pixels = np.asarray(picture(16, 16).convert("RGB").convert(stored)).copy()
    pixels[..., -1] = np.arange(256).reshape(16, 16)
    content = encode(
        Image.fromarray(
            pixels,
        ),
        form,
        **({"lossless": True, "exact": True} if form == "WEBP" else {}),
    )
    opacity = pixels[..., -1:] / 255
    expected = opacity * pixels[..., :-1] + (1 - opacity) * np.array((16, 32, 48))
    assert decode(content, background="#102030").transpose(1, 2, 0) == pytest.approx(
        expected, abs=1
    )
    luma = expected @ (0.299, 0.587, 0.114)
    assert decode(content, background="#102030", mode="L")[0] == pytest.approx(luma, abs=1.5)


def test_grey_may_be_stored_times_its_opacity() -> None:
    stored = bytes((60, 128)) * 256
    content = tiff(stored, bits=(8, 8), samples=(2,), extra_samples=(1,))
    assert decode(content, mode="L", background="#000000")[0, 0, 0] == 60
    assert decode(content, mode="L", background="#ffffff")[0, 0, 0] == 60 + 127


def test_transparency_does_not_bleed_in_resizing() -> None:
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    assert np.all(decode(encode(image), background="#000000") == 0)


@pytest.mark.parametrize(
    ("form", "opacity"), [("GIF", 1), ("PNG", 1), ("PNG", bytes((255, 0, 128)))]
)
def test_a_palette_may_have_transparent_colours(form: str, opacity: int | bytes) -> None:
    image = Image.new("P", (16, 16))
    image.paste(1, (8, 0, 16, 16))
    image.putpalette(RED + GREEN + BLUE)
    pixels = decode(encode(image, form, transparency=opacity), background="#102030")
    assert pixels[:, 0, 0].tolist() == list(RED)
    assert pixels[:, 0, 15].tolist() == [16, 32, 48]


@pytest.mark.parametrize(
    ("depth", "colour", "pixels", "transparent"),
    [
        (1, 0, b"\x40", struct.pack(">H", 1)),
        (2, 0, b"\x30", struct.pack(">H", 3)),
        (4, 0, b"\x05", struct.pack(">H", 5)),
        (8, 0, b"\x00\x07", struct.pack(">H", 7)),
        (16, 0, struct.pack(">2H", 0, 0x1234), struct.pack(">H", 0x1234)),
        (8, 2, b"\0\0\0\1\2\3", struct.pack(">3H", 1, 2, 3)),
        (16, 2, struct.pack(">6H", 0, 0, 0, 0x1234, 7, 7), struct.pack(">3H", 0x1234, 7, 7)),
    ],
)
def test_a_png_may_call_one_value_transparent(
    depth: int, colour: int, pixels: bytes, transparent: bytes
) -> None:
    content = png(2, 1, depth, colour, pixels, tRNS=transparent)
    decoded = decode(content, resolution=2, fit="stretch", background="#102030")
    assert decoded[:, 0].T.tolist() == [[0, 0, 0], [16, 32, 48]]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), WHITE)],
)
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_become_colours(form: str, ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
    content = encode(Image.new("CMYK", (16, 16), ink), form)
    assert decode(content)[:, 8, 8].tolist() == list(colour)


def test_inks_may_be_stored_as_luma_and_chroma() -> None:
    ink = (30, 200, 90)
    luma_and_chroma = np.asarray(Image.new("RGB", (1, 1), ink).convert("YCbCr"))[0, 0]
    planes = [*luma_and_chroma.tolist(), 255]  # no black
    content = bytearray(
        encode(Image.new("CMYK", (16, 16), tuple(255 - v for v in planes)), "JPEG", quality=100)
    )
    content[content.index(b"Adobe") + 11] = 2  # the planes are YCCK
    assert decode(bytes(content))[:, 8, 8].tolist() == pytest.approx([225, 55, 165], abs=3)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_are_what_their_profile_says(form: str) -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    content = encode(image, form, icc_profile=cmyk_profile((136, 208, 195)))
    assert decode(content)[:, 8, 8].tolist() == pytest.approx(RED, abs=10)


@pytest.mark.parametrize("profile", [b"junk", cmyk_profile((136, 208, 195))[:900]])
def test_a_profile_that_does_not_work_is_passed_over(profile: bytes) -> None:
    content = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", icc_profile=profile)
    assert decode(content)[:, 8, 8].tolist() == [0, 255, 255]


# --- more frames


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animated_file_the_first_frame_is_used(form: str) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    content = encode(first, form, save_all=True, append_images=[second])
    decoded = decode_image(content, settings())
    assert decoded is not None
    assert decoded.is_animated
    assert decoded.pixels[:, 8, 8].tolist() == pytest.approx(RED, abs=3)
    still = decode_image(encode(first, form), settings())
    assert still is not None
    assert not still.is_animated


def test_a_photograph_with_a_second_picture_is_a_still() -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    content = encode(first, "MPO", save_all=True, append_images=[second])
    decoded = decode_image(content, settings())
    assert decoded is not None
    assert not decoded.is_animated
    assert decoded.pixels[:, 8, 8].tolist() == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_frames_after_the_first_are_not_decoded(form: str) -> None:
    content = encode(picture(), form, save_all=True, append_images=[picture(seed=1)])
    decoded = decode_image(content[:-100], settings())
    assert decoded is not None
    assert decoded.is_animated


def test_junk_behind_a_gif_is_no_frame() -> None:
    decoded = decode_image(encode(picture(), "GIF")[:-1] + b"!", settings())
    assert decoded is not None
    assert not decoded.is_animated


# --- what is refused


@pytest.mark.parametrize(
    "content",
    [b"hello", b"RIFF\x24\0\0\0WAVEfmt ", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg></svg>", b"\x89PNG"],
)
def test_what_is_no_image_is_refused(content: bytes) -> None:
    assert refusal(content)[0] == "not_an_image"


def test_an_empty_file_is_refused() -> None:
    assert refusal(b"")[0] == "empty"


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
    ],
)
def test_an_image_that_is_cut_short_is_refused(form: str, options: dict[str, Any]) -> None:
    content = encode(picture(64, 64), form, **options)
    for size in (20, len(content) // 4, len(content) // 2, len(content) * 3 // 4):
        assert refusal(content[:size])[0] == "truncated"


def test_a_packed_tiff_whose_strips_end_behind_its_end_is_refused() -> None:
    packed = zlib.compress(bytes(256))
    assert decode(tiff(packed, compression=(8,))).shape == (3, 16, 16)
    assert refusal(tiff(packed, compression=(8,), counts=(10_000,)))[0] == "truncated"


def test_a_damaged_image_is_refused_with_what_is_wrong() -> None:
    content = bytearray(encode(picture()))
    content[30] ^= 1
    assert refusal(bytes(content)) == (
        "undecodable",
        "broken PNG file (bad header checksum in b'IHDR')",
    )


def with_size(form: str, width: int, height: int) -> bytes:
    """A file whose header promises more pixels than it has."""
    content = bytearray(encode(picture(), form))
    match form:
        case "PNG":
            return png(width, height, 8, 2, b"")
        case "JPEG":
            at = content.index(b"\xff\xc0") + 5
            content[at : at + 4] = struct.pack(">HH", height, width)
        case "BMP":
            content[18:26] = struct.pack("<II", width, height)
        case "GIF":
            content[6:10] = struct.pack("<HH", width, height)
        case "TIFF":
            return tiff(b"", width=(width,), height=(height,))
        case "WEBP":
            canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + canvas
    return bytes(content)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_too_many_pixels_are_refused_before_they_are_decoded(form: str) -> None:
    reason, detail = refusal(with_size(form, 60_000, 60_000))
    assert reason == "too_many_pixels"
    assert detail == "60000 x 60000 pixels are too many, data.max_pixels is 67108864"


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": exif(1)}])
def test_each_kind_of_webp_is_measured_before_it_is_opened(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(picture(40, 20), "WEBP", **options)
    assert decode_image(content, settings(max_pixels=800)) is not None

    def fail(*_: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(WebPImageFile, "__init__", fail)
    assert refusal(content, max_pixels=799)[0] == "too_many_pixels"


def test_a_frame_beyond_the_edge_of_its_gif_is_counted() -> None:
    content = bytearray(encode(picture(), "GIF"))
    at = content.index(b",\0\0\0\0\x10\0\x10\0")
    for size, reason in ((4000, "too_many_pixels"), (60_000, "too_many_pixels")):
        content[at + 5 : at + 9] = struct.pack("<HH", size, size)
        assert refusal(bytes(content), max_pixels=10_000_000)[0] == reason


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_more_pixels_than_pillow_allows_are_decoded_when_asked_for(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encode(picture(80, 80), form), max_pixels=6400).shape == (3, 16, 16)
    assert refusal(encode(picture(80, 80), form), max_pixels=6399)[0] == "too_many_pixels"


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    content = encode(picture(), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    assert decode(content[:-2] + 50 * scan + content[-2:]).shape == (3, 16, 16)
    many = 500 * scan + content[-2:]
    assert refusal(content[:-2] + many)[0] == "undecodable"
    assert decode(content + many).shape == (3, 16, 16)
    assert decode(content[:2] + segment(0xFE, 200 * b"\xff\xda") + content[2:]).shape == (3, 16, 16)


def test_a_jpeg_of_very_many_segments_is_refused_before_all_are_gone_through() -> None:
    content = encode(picture(), "JPEG", progressive=True)
    many = segment(0xFE, 200 * b"\xff\xda") + 20_000 * b"\xff\xfe\0\2"
    assert refusal(content[:2] + many + content[2:])[0] == "undecodable"


@pytest.mark.parametrize(
    "end",
    [
        b"\xff\xfe\0\4\xff\xd9",  # in a segment
        b"\xff\xfe\0\0\xff\xfe\0\4\xff\xd9",  # behind one of a wrong length
        b"\xff\0\xd9\xff\xff\0\xd9",  # of stuffed bytes
        b"\xff\xd0\xff\x01\xff\x02\xff\xff",  # markers without a length, which hide none
    ],
)
def test_an_end_that_is_none_hides_no_scans(end: bytes) -> None:
    content = encode(picture(), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    told = refusal(content[:-2] + end + 500 * scan + content[-2:])
    assert told == ("undecodable", "it has more than 100 scans")


def test_tiles_far_larger_than_their_image_are_refused() -> None:
    packed = zlib.compress(bytes(256))
    tiled = {"offsets": None, "counts": None, "rows": None, "compression": (8,)}
    tiled |= {"tile_offsets": (8,), "tile_counts": (len(packed),)}
    assert decode(tiff(packed, **tiled, tile_width=(16,), tile_height=(16,))).shape == (3, 16, 16)
    reason, _ = refusal(tiff(packed, **tiled, tile_width=(1 << 15,), tile_height=(1 << 15,)))
    assert reason == "too_many_pixels"


def test_strips_that_cover_each_other_are_refused() -> None:
    content = tiff(bytes(256), rows=(8,), offsets=(8, 136) * 500, counts=(128,) * 1000)
    assert refusal(content) == ("undecodable", "its 1000 tiles cover each other")


def test_a_bmp_of_empty_runs_is_refused() -> None:
    runs = b"\1\5\0\0" * 1000 + b"\0\1"  # a pixel and the end of a line, again and again
    head = struct.pack("<IiiHHIIiiII", 40, 1000, 1000, 1, 8, 1, len(runs), 0, 0, 256, 0)
    content = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + head + bytes(1024) + runs
    assert refusal(content)[0] == "truncated"


# --- quiet


def test_decoders_neither_warn_nor_log_nor_print(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    palette = Image.new("P", (16, 16))
    palette.putpalette(RED + GREEN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(png(1, 1, 8, 0, b"\0", acTL=bytes(8)))
        decode(encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(20)))
        decode(encode(palette, transparency=bytes((0, 128))))
        refusal(tiff(b"no LZW", compression=(5,)))
        refusal(tiff(bytes(256), samples=(100,)))
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")
    assert (caught, caplog.records) == ([], [])


def noted(num_bytes: int, kind: bytes) -> bytes:
    """A PNG of one grey pixel with a chunk that inflates to so many bytes."""
    start = b"XML:com.adobe.xmp\0\1\0\0\0" if kind == b"iTXt" else b"x\0\0"
    return png(1, 1, 8, 0, b"\0", **{kind.decode(): start + zlib.compress(bytes(num_bytes))})


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_what_a_png_notes_may_be_long_and_is_bounded(kind: bytes) -> None:
    assert decode(noted(5 << 20, kind)).shape == (3, 16, 16)
    assert refusal(noted(65 << 20, kind))[0] == "undecodable"


def test_warnings_of_others_are_left_alone() -> None:
    decode(encode(picture()))
    with pytest.raises(UserWarning):
        warnings.warn("of ours", UserWarning, stacklevel=1)


def test_an_error_of_any_kind_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), KeyError("x"), OverflowError("a\nb"), RuntimeWarning("w")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(PngImageFile, "load", fail)
        reason, detail = refusal(encode(picture()))
        assert reason == "undecodable"
        assert detail


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A copy with bits flipped, numbers made extreme, parts cut, or the head of another file."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(changed), rng.choice((64, 4096))))
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\x20\0", bytes(4)))
            case 2:
                del changed[rng.randrange(20, len(changed) + 20) :]
            case 3:
                changed[:20] = rng.choice(others)[:20]
            case 4:
                del changed[at : at + rng.randrange(1, 9)]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def test_mutated_files_are_decoded_or_refused() -> None:
    forms = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    files = [encode(picture(20, 24), form) for form in forms]
    files += [
        encode(picture(20, 24), form, save_all=True, append_images=[picture()])
        for form in ("PNG", "GIF")
    ]
    files += [encode(picture(), "JPEG", exif=exif(6), progressive=True)]
    files += [encode(picture().convert("CMYK"), "JPEG", icc_profile=cmyk_profile((1, 2, 3)))]
    files += [encode(picture(), "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "packbits")]
    rng, data, ends = random.Random(0), settings(max_pixels=1 << 20), []
    for content in files:
        for _ in range(60):
            try:
                decoded = decode_image(mutate(content, files, rng), data)
            except Refused as refused:
                ends.append((refused.reason, refused.detail))
            else:
                assert decoded is not None
                assert decoded.pixels.shape == (3, 16, 16)
    assert all(detail.isprintable() for _, detail in ends)
    assert len(ends) < 60 * len(files)
    reasons = {reason for reason, _ in ends}
    assert reasons == {"truncated", "undecodable", "not_an_image", "too_many_pixels"}


# --- JPEG at a fraction of its size


@functools.cache
def drawn(kind: str, side: int) -> Image.Image:
    """A picture of a kind: power-law and dead leaves look natural; strokes and noise do not."""
    rng, height = np.random.default_rng(side), side * 4 // 3
    if kind == "noise":
        return picture(side, height)
    if kind == "power-law":
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(side))
        frequency[0, 0] = np.inf
        waves = np.fft.fft2(rng.normal(size=(3, height, side))) / frequency
        planes = np.fft.ifft2(waves).real
        planes = 125 + 15 * planes / planes.std() + 45 * planes[:1] / planes[:1].std()
        return Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    image = Image.new("RGB", (side, height), WHITE)
    draw = ImageDraw.Draw(image)
    for _ in range(600):
        x, y = rng.random(2) * (side, height)
        if kind == "leaves":
            radius = side * min(0.25, 0.008 / (rng.random() + 0.01))
            colour = tuple(int(v) for v in rng.integers(0, 256, 3))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            dx, dy = rng.normal(size=2) * side / 40
            draw.line((x, y, x + dx, y + dy), fill=0, width=max(1, side // 100))
    return image


@pytest.mark.parametrize("resample", ["area", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("kind", "mean"), [("power-law", 2.5), ("leaves", 2.5), ("strokes", 6.5), ("noise", 6.5)]
)
def test_a_draft_differs_from_the_full_decode_within_the_bound(
    kind: str, mean: float, resample: str
) -> None:
    for fraction in (2, 4):
        for above in (1.0, 1.2):  # the fraction is coarsest where it just applies
            image = drawn(kind, int(32 * images.DRAFT_GAP[resample] * fraction * above))
            for subsampling in (0, 2):
                content = encode(image, "JPEG", quality=75, subsampling=subsampling)
                draft = decode(content, resolution=32, resample=resample)
                full = decode(content, resolution=32, resample=resample, jpeg_draft=False)
                difference = np.abs(draft.astype(int) - full)
                assert 0 < difference.mean() <= mean
                assert np.percentile(difference, 99.9) <= 30


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_a_jpeg_is_not_drafted_below_the_gap(fit: str) -> None:
    size = (63, 80) if fit == "pad" else (100, 63)
    side = 80 if fit == "pad" else 63
    content = encode(picture(*size), "JPEG")
    for resolution in (side // 4 + 1, side // 4):
        full = decode(content, resolution=resolution, fit=fit, jpeg_draft=False)
        is_drafted = not np.array_equal(decode(content, resolution=resolution, fit=fit), full)
        assert is_drafted == (resolution == side // 4)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_a_draft_lies_where_the_image_lay(fit: str, orientation: int) -> None:
    x, y = np.meshgrid(np.arange(267), np.arange(331))  # eighths and quarters leave a rest
    ramps = np.stack([x / 267, y / 331, (x + y) / 598], -1)
    content = encode(
        Image.fromarray((255 * ramps).astype(np.uint8)), "JPEG", quality=98, exif=exif(orientation)
    )
    draft = decode(content, fit=fit, background="#808080").astype(int)
    full = decode(content, fit=fit, background="#808080", jpeg_draft=False)
    assert np.abs(draft - full).mean() < 0.7  # a pixel of the draft would be 2
