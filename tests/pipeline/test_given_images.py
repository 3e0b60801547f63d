import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.settings import Config
from pipeline.subject_kinds import GivenImages, find_subject


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(tiny_config, [f"storage.root={tiny_config.parent / 'runs'}"])


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)


def find(config: Config, folder: Path, **options: Any) -> Any:
    return find_subject(config, checkpoint=None, images=[str(folder)], **options)


def test_images_of_the_data_set_s_shape_are_taken(config: Config, tmp_path: Path) -> None:
    write(tmp_path / "given" / "a.png", grey(0))
    write(tmp_path / "given" / "b.png", np.stack([grey(1)] * 3, axis=-1))  # grey, stored as RGB
    found = find(config, tmp_path / "given")
    assert isinstance(found, GivenImages)
    assert [len(shard.files) for shard in found.shards] == [2]


@pytest.mark.parametrize(
    ("pixels", "fault"),
    [
        (grey(0, 16), "b.png has 16 x 16 pixels"),
        (np.stack([grey(k) for k in range(3)], axis=-1), "b.png has colours"),
    ],
)
def test_others_are_refused_unless_they_are_to_be_converted(
    config: Config, tmp_path: Path, pixels: np.ndarray, fault: str
) -> None:
    write(tmp_path / "given" / "a.png", grey(0))
    write(tmp_path / "given" / "b.png", pixels)
    with pytest.raises(DataError) as caught:
        find(config, tmp_path / "given")
    assert "1 of 2 images are not of the data set's shape, 8 x 8 grey" in str(caught.value)
    assert fault in str(caught.value)
    assert isinstance(find(config, tmp_path / "given", converts=True), GivenImages)


def test_grey_images_are_no_rgb(config: Config, tmp_path: Path) -> None:
    colours = config.model_copy(update={"data": config.data.model_copy(update={"mode": "RGB"})})
    write(tmp_path / "given" / "a.png", grey(0))
    with pytest.raises(DataError, match=r"8 x 8 RGB: a\.png is grey"):
        find(colours, tmp_path / "given")


def test_tar_files_are_looked_into(
    config: Config, tmp_path: Path, make_tar: Callable[..., Path], make_png: Callable[..., bytes]
) -> None:
    members = [("a.png", make_png(0, (8, 8))), ("b.png", make_png(0, (9, 8))), ("c.png", b"x")]
    make_tar(tmp_path / "given.tar", members)
    with pytest.raises(DataError, match=r"1 of 2 images .*: b\.png has 8 x 9 pixels"):
        find(config, tmp_path / "given.tar")


def test_a_transparent_palette_is_no_trouble(config: Config, tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(grey(0)).convert("P").save(content, "PNG", transparency=3)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.png").write_bytes(content.getvalue())
    assert isinstance(find(config, tmp_path / "given"), GivenImages)


def test_what_is_not_there_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no images at"):
        find(config, tmp_path / "none")
    with pytest.raises(ConfigError, match="two things to evaluate"):
        find_subject(config, checkpoint=tmp_path, images=["x"])
    assert find_subject(config, checkpoint=None, images=[]) is None
