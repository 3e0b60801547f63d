import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline import images
from pipeline.images import decode_image
from pipeline.plain_jpegs import draft_scale, read_plain_head
from pipeline.readers.entries import Refused
from pipeline.settings import DataConfig


def jpeg(
    width: int = 100, height: int = 60, mode: str = "RGB", *, grain: int = 4, **options: Any
) -> bytes:
    """A picture of blocks of `grain` pixels."""
    blocks = (height // grain + 1, width // grain + 1, 3)
    noise = np.random.default_rng(0).integers(0, 256, blocks, dtype=np.uint8)
    image = Image.fromarray(noise.repeat(grain, 0).repeat(grain, 1)[:height, :width])
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    """Inserted behind the first two bytes."""
    segment = bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body
    return content[:2] + segment + content[2:]


def outcome(content: bytes, data: DataConfig) -> Any:
    """What becomes of it: what it is left out or refused for, or its pixels."""
    try:
        decoded = decode_image(content, data)
    except Refused as refused:
        return refused.reason, refused.detail
    return decoded if decoded is None else (decoded.pixels.tolist(), decoded.is_animated)


def fail(*_: Any) -> None:
    raise AssertionError("not the short way")


def check_same(content: bytes, data: DataConfig) -> bool:
    """Fails unless it ends as it would without the short way; whether it went that way alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "open_image", fail)
        short = outcome(content, data)
    is_short = short != ("undecodable", "not the short way")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "read_plain_head", lambda _: None)
        long = outcome(content, data)
    assert outcome(content, data) == long
    assert not is_short or short == long
    return is_short


ORDINARY: dict[str, dict[str, Any]] = {
    "default": {},
    "grey": {"mode": "L"},
    "full colours": {"subsampling": 0},
    "half colours": {"subsampling": 1},
    "own tables": {"optimize": True, "quality": 30},
    "restarts": {"restart_marker_blocks": 3},
    "comment": {"comment": b"of someone"},
    "large": {"width": 250, "height": 150, "grain": 1, "quality": 95},
    "one pixel": {"width": 1, "height": 1},
    "a line": {"width": 300, "height": 1},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_ones_give_the_pixels_of_pillow(name: str) -> None:
    content = jpeg(**ORDINARY[name])
    width, mode = ORDINARY[name].get("width", 100), ORDINARY[name].get("mode", "RGB")
    head = read_plain_head(content)
    assert head is not None
    assert (head.size[0], head.mode) == (width, mode)
    asked: tuple[dict[str, Any], ...] = (
        {"resolution": 8},
        {"resolution": 16, "resample": "area", "fit": "stretch"},
        {"resolution": 64, "resample": "bicubic", "fit": "pad"},
        {"resolution": 4, "fit": "pad", "mode": "L"},
        {"resolution": 8, "jpeg_draft": False},
        {"resolution": 8, "min_resolution_px": 61},
        {"resolution": 8, "max_pixels": 5999},
    )
    for changes in asked:
        assert check_same(content, DataConfig(sources=("x",), **changes))


UNUSUAL: dict[str, bytes] = {
    "EXIF": jpeg(exif=b"Exif\0\0II*\0"),
    "a profile": jpeg(icc_profile=b"profile"),
    "several scans": jpeg(progressive=True),
    "inks": jpeg(mode="CMYK"),
    "the marker of Adobe": with_segment(jpeg(), 0xEE, b"Adobe\0\x64\0\0\0\0\1"),
    "another JFIF": with_segment(jpeg(), 0xE0, b"JFXX\0\x10" + bytes(8)),
    "a short JFIF": with_segment(jpeg(), 0xE0, b"JFIF\0"),
    "tables of 16 bits": with_segment(jpeg(), 0xDB, b"\x10" + bytes(range(1, 129))),
    "half a table": with_segment(jpeg(), 0xDB, bytes(32)),
    "two frames": with_segment(jpeg(), 0xC0, b"\x08\0\x3c\0\x64\1\1\x11\0"),
    "12 bits": jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "no height": jpeg().replace(b"\0\x3c\0\x64\3", b"\0\0\0\x64\3"),
    "two layers": jpeg().replace(b"\0\x3c\0\x64\3", b"\0\x3c\0\x64\2"),
    "a scan of one layer": jpeg().replace(b"\xff\xda\0\x0c\3", b"\xff\xda\0\x0c\1"),
    "filling": jpeg()[:2] + b"\xff" + jpeg()[2:],
    "no frame": jpeg().replace(b"\xff\xc0", b"\xff\xfe"),
    "no JPEG": b"\xff\xd7" + jpeg()[2:],
    "something between segments": jpeg().replace(b"\xff\xc0", b"\xfe\xc0"),
    "a table of number 4": with_segment(jpeg(), 0xDB, b"\4" + bytes(range(1, 65))),
    "a frame of four in three": jpeg()
    .replace(b"\3\x11\1\xff", b"\3\x11\1\4\x11\1\xff")
    .replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\x14"),
    "a frame too short": b"\xff\xd8\xff\xc0\0\2",
    "a segment of no size": jpeg()[:2] + b"\xff\xfe\0\0" + jpeg()[2:],
    "an extended frame": jpeg().replace(b"\xff\xc0", b"\xff\xc1"),
    "a number of lines": with_segment(jpeg(), 0xDC, b"\0\x3c"),
    "an end before the scan": with_segment(jpeg(), 0xD9, b""),
    "more pixels than bytes could say": jpeg().replace(b"\0\x3c\0\x64\3", b"\x1f\0\x1f\0\3"),
    "more than Pillow decodes at once": jpeg(600, 400, grain=1, quality=95),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_ones_are_left_to_pillow(name: str) -> None:
    assert read_plain_head(UNUSUAL[name]) is None


def test_a_head_that_is_cut_short_is_none() -> None:
    content = jpeg()
    head_bytes = content.index(b"\xff\xda") + 14
    assert read_plain_head(content[:head_bytes]) is not None
    assert all(read_plain_head(content[:end]) is None for end in range(head_bytes))


def test_damage_where_a_block_ends_ends_as_with_pillow_alone() -> None:
    """libjpeg reads FF FF 00 in another way where it knows that the block reaches far enough."""
    content, data = jpeg(600, 400, grain=1, quality=95), DataConfig(sources=("x",), resolution=64)
    at = content.index(b"\xff\0", ImageFile.MAXBLOCK - 3000)
    damaged = content[: at - 1] + b"\xff" + content[at:]
    assert not check_same(damaged, data)


def test_damaged_ones_end_as_with_pillow_alone() -> None:
    rng, data = random.Random(0), DataConfig(sources=("x",), resolution=16)
    files = [jpeg(**options) for options in ORDINARY.values()]
    files.append(jpeg(600, 400, grain=1, quality=95))
    num_short = 0
    for _ in range(600):
        content = bytearray(rng.choice(files))
        match rng.randrange(3):
            case 0:  # the end is missing, often only a little of it
                del content[-rng.choice((1, 2, 3, rng.randrange(1, len(content)))) :]
            case 1:  # anywhere
                content[rng.randrange(len(content))] = rng.choice((0, 255, rng.randrange(256)))
            case 2:  # in the head
                content[rng.randrange(min(len(content), 640))] = rng.randrange(256)
        num_short += check_same(bytes(content), data)
    assert 200 < num_short < 400


def test_the_scale_of_a_draft_is_that_of_pillow() -> None:
    for width, height in ((1, 1), (7, 300), (16, 16), (63, 64), (129, 100), (511, 512)):
        content = jpeg(width, height)
        for least in ((1, 1), (8, 1), (1, 8), (8, 8), (16, 32), (65, 65)):
            image = Image.open(io.BytesIO(content))
            drafted = image.draft(None, least)
            assert drafted is not None
            assert draft_scale((width, height), least) == width / drafted[1][2]
