"""The examples: introductory ones print their number and write their picture; data is read."""

import gzip
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.dataset_document import check_document, make_document
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("example", "options", "number"),
    [
        ("s_curve", (), r"enough noise: distance .* samples to data \d+\.\d+ by DDPM"),
        ("sequence", ("--sample-steps=2",), r"strongest frequency: samples \d\.\d+, real \d\.\d+"),
        ("tiny_unet", ("--sample-steps=2",), r"without t: distance of samples to data \d+\.\d+"),
        ("straight_path", (), r"distance to data in 20 steps: \d+\.\d+"),
    ],
)
def test_an_example_prints_its_number_and_writes_its_picture(
    example: str, options: tuple[str, ...], number: str, tmp_path: Path
) -> None:
    script = ROOT / "examples" / example / f"{example}.py"
    picture = tmp_path / "picture.png"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "--num-steps=2", f"--output={picture}", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(number, done.stdout), done.stdout
    assert done.stdout.splitlines()[-1] == str(picture)
    with Image.open(picture) as image:
        assert image.width == 1040  # what the labels are laid out for


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def test_fashion_mnist_is_preprocessed_from_files_in_its_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directory = tmp_path / "fashion-mnist"
    directory.mkdir()
    for part, count in (("train", 240), ("t10k", 40)):
        pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (directory / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (directory / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    config = load_config(
        ROOT / "examples" / "fashion_mnist" / "fashion_mnist.toml",
        [f'data.sources=["{directory}"]'],
    )
    storage = LocalStorage(str(tmp_path / "runs"))
    inputs = list_inputs(config.data, storage)
    assert [shard.name for shard in inputs.shards] == [
        "t10k-images-idx3-ubyte.gz",
        "train-images-idx3-ubyte.gz",
    ]
    units = [preprocess_shard(shard, config.data, storage) for shard in inputs.shards]
    document = make_document(config.data, storage, inputs.shards, units, inputs.ignored)
    check_document(document, config.data, "")
    assert sum(document["counts"].values()) == 280
    assert document["shape"] == [1, 28, 28]
    assert document["refused"]["count"] == 0
    labels = [document["labels"][split] for split in ("train", "validation", "test")]
    assert {str(k): sum(found.get(str(k), 0) for found in labels) for k in range(10)} == {
        str(k): 28 for k in range(10)
    }
