import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.preprocess import SPLITS, preprocess_shard, unit_key
from pipeline.settings import DataConfig
from pipeline.shards import ArrowImages, ImageRow, write_arrow
from pipeline.sources import InputShard
from pipeline.storage import LocalStorage

Members = list[tuple[str, bytes]]
DATA = DataConfig(
    sources=("x",), resolution=8, mode="L", validation_fraction=0.2, test_fraction=0.2
)


@pytest.fixture
def preprocess(tmp_path: Path, make_tar: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Preprocesses a shard with these members into `<tmp_path>/<directory>`."""

    def run(members: Members, directory: str = "u", data: DataConfig = DATA) -> dict[str, Any]:
        path = make_tar(tmp_path / "s.tar", members)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        shard = InputShard("s.tar", str(path), sha256, path.stat().st_size)
        return preprocess_shard(shard, data, LocalStorage(str(tmp_path)), directory)

    return run


def read(tmp_path: Path, directory: str = "u") -> dict[str, tuple[np.ndarray, int | None]]:
    """All rows of a result by source, through plain pyarrow."""
    rows = {}
    for split in SPLITS:
        table = pa.ipc.open_file(str(tmp_path / directory / f"{split}.arrow")).read_all()
        for row in range(table.num_rows):
            pixels = table["image"].chunk(0).to_numpy_ndarray()[row]
            rows[table["source"][row].as_py()] = (pixels, table["label"][row].as_py())
    return rows


def test_every_image_arrives_once_with_its_label(
    tmp_path: Path, preprocess: Callable[..., Any], make_png: Callable[..., bytes]
) -> None:
    members: Members = []
    for k in range(40):
        members += [(f"{k:03d}.png", make_png(k)), (f"{k:03d}.cls", str(k % 3).encode())]
    manifest = preprocess(members)
    rows = read(tmp_path)
    assert sorted(rows) == [f"s.tar/{k:03d}.png" for k in range(40)]
    for k in range(40):
        pixels, label = rows[f"s.tar/{k:03d}.png"]
        expected = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        assert np.array_equal(pixels[0], expected)
        assert label == k % 3
    counts = {split: manifest["splits"][split]["count"] for split in SPLITS}
    assert sum(counts.values()) == 40
    assert min(counts.values()) > 0


def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, preprocess: Callable[..., Any], make_png: Callable[..., bytes]
) -> None:
    members = [(f"{k}.png", make_png(k)) for k in range(10)]
    preprocess(members, "one")
    preprocess(members, "two")
    for split in SPLITS:
        one, two = (tmp_path / d / f"{split}.arrow" for d in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_an_image_keeps_its_split_whatever_is_around_it(
    tmp_path: Path, preprocess: Callable[..., Any], make_png: Callable[..., bytes]
) -> None:
    def splits(members: Members) -> dict[str, str]:
        preprocess(members)
        found = {}
        for split in SPLITS:
            table = pa.ipc.open_file(str(tmp_path / "u" / f"{split}.arrow")).read_all()
            found |= dict.fromkeys(table["source"].to_pylist(), split)
        return found

    few = splits([(f"{k}.png", make_png(k)) for k in range(10)])
    many = splits([(f"{k}.png", make_png(k)) for k in range(30)])
    assert few == {source: many[source] for source in few}


def test_wide_images_lose_their_sides_and_colour_becomes_three_channels(
    tmp_path: Path, preprocess: Callable[..., Any], make_png: Callable[..., bytes]
) -> None:
    data = DATA.model_copy(update={"mode": "RGB"})
    preprocess([("a.png", make_png(0, (16, 40, 3)))], data=data)
    ((pixels, label),) = read(tmp_path).values()
    assert pixels.shape == (3, 8, 8)
    assert label is None
    middle = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)[:, 12:28]
    assert pixels.mean() == pytest.approx(middle.mean(), abs=4)


def test_bad_images_are_listed_not_dropped(
    preprocess: Callable[..., Any], make_png: Callable[..., bytes]
) -> None:
    good = make_png(1)
    manifest = preprocess(
        [("0.png", good), ("1.png", b""), ("2.png", good[: len(good) // 2]), ("3.jpg", b"no")]
    )
    assert sum(manifest["splits"][s]["count"] for s in SPLITS) == 1
    assert [item["source"] for item in manifest["refused"]] == [
        "s.tar/1.png",
        "s.tar/2.png",
        "s.tar/3.jpg",
    ]
    assert all(item["reason"] for item in manifest["refused"])


def test_a_decompression_bomb_is_one_refused_image(
    preprocess: Callable[..., Any], make_png: Callable[..., bytes]
) -> None:
    def huge(side: int) -> bytes:  # a header that promises more pixels than it has
        content = bytearray(make_png(0))
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return bytes(content)

    manifest = preprocess([("0.png", make_png(1)), ("1.png", huge(9000)), ("2.png", huge(60000))])
    assert [item["source"] for item in manifest["refused"]] == ["s.tar/1.png", "s.tar/2.png"]
    assert "9000 x 9000 pixels are too many" in manifest["refused"][0]["reason"]


def test_a_compressed_shard_that_is_cut_short_is_refused(
    tmp_path: Path, make_tar: Callable[..., Path], make_png: Callable[..., bytes]
) -> None:
    members = [(f"{k}.png", make_png(k, (64, 64))) for k in range(20)]
    content = gzip.compress(make_tar(tmp_path / "a.tar", members).read_bytes())
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content[: len(content) // 2])
    shard = InputShard("a.tar.gz", str(path), "", 0)
    with pytest.raises(DataError, match="cannot be read to its end"):
        preprocess_shard(shard, DATA, LocalStorage(str(tmp_path)), "u")
    assert not (tmp_path / "u").exists()


def test_a_shard_that_changed_since_the_plan_is_refused(
    tmp_path: Path, make_tar: Callable[..., Path], make_png: Callable[..., bytes]
) -> None:
    path = make_tar(tmp_path / "s.tar", [("0.png", make_png(0))])
    shard = InputShard("s.tar", str(path), "0" * 64, 0)
    with pytest.raises(DataError, match="changed while it was read"):
        preprocess_shard(shard, DATA, LocalStorage(str(tmp_path)), "u")
    assert not (tmp_path / "u").exists()


def test_a_shard_without_images_is_refused(preprocess: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"s\.tar holds no image"):
        preprocess([("readme.txt", b"hello")])


@pytest.mark.parametrize("label", [b"cat", b"-1"])
def test_a_label_that_is_none_is_refused(
    preprocess: Callable[..., Any], make_png: Callable[..., bytes], label: bytes
) -> None:
    with pytest.raises(DataError, match=r"label in s\.tar/0\.cls must be"):
        preprocess([("0.png", make_png(0)), ("0.cls", label)])


def test_the_key_follows_content_and_transform() -> None:
    shard = InputShard("s.tar", "/somewhere/s.tar", "ab", 1)
    key = unit_key(shard, DATA)
    moved = InputShard("s.tar", "/elsewhere/s.tar", "ab", 1)
    assert unit_key(moved, DATA) == key
    assert unit_key(InputShard("s.tar", "/somewhere/s.tar", "cd", 1), DATA) != key
    assert unit_key(shard, DATA.model_copy(update={"resolution": 16})) != key
    assert unit_key(shard, DATA.model_copy(update={"sources": ("other",)})) == key


def test_gathers_from_several_shards_in_any_order(tmp_path: Path) -> None:
    pixels = np.arange(7 * 4, dtype=np.uint8).reshape(7, 1, 2, 2)
    for name, part in (("a", pixels[:3]), ("b", pixels[:0]), ("c", pixels[3:])):
        rows = [ImageRow(image, None, "x") for image in part]
        (tmp_path / name).write_bytes(write_arrow(rows, (1, 2, 2)))
    images = ArrowImages([tmp_path / name for name in "abc"])
    assert len(images) == 7
    ids = np.array([6, 0, 3, 2, 0])
    assert np.array_equal(images.gather(ids), pixels[ids])
    assert images.labels.tolist() == [-1] * 7
