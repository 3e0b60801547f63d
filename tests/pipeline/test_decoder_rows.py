"""The rows of Pillow's decoder: memory is kept within a bound, and pixels stay as they are."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline import decoder_rows
from pipeline.decoder_rows import prepare_rows


@pytest.mark.parametrize("width", [1, 126, 127, 128, 132, 133, 256, 4096, 4097, 65_535])
def test_what_is_kept_is_bounded(width: int) -> None:
    for _ in range(2000):
        prepare_rows(width)
    assert len(decoder_rows._kept) <= 256
    assert sum(map(len, decoder_rows._kept)) <= 4 << 20


@pytest.mark.parametrize("width", [128, 132])
def test_pixels_are_the_same(width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    before = np.asarray(Image.open(io.BytesIO(file.getvalue())))
    for _ in range(100):
        prepare_rows(width)
        after = np.asarray(Image.open(io.BytesIO(file.getvalue())))
        np.testing.assert_array_equal(after, before)


def test_slow_places_are_kept_and_fast_ones_given_back() -> None:
    decoder_rows._kept.clear()
    for _ in range(500):
        prepare_rows(128)
    assert all(id(place) % 32 == 0 for place in decoder_rows._kept)
