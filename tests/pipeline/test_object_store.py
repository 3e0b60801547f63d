"""Input and storage root on S3, by its real protocol."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.convert import preprocess_shard
from pipeline.errors import DataError
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import open_storage
from pipeline.units import missing_units, unit_directory

IMAGES: dict[str, Any] = {"resolution": 8, "mode": "L"}
SPLITS: dict[str, Any] = {"validation_fraction": 0.0, "test_fraction": 0.0}
DATA = IMAGES | SPLITS


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_a_glob_and_a_directory_of_a_bucket(
    object_store: Any, make_png: Callable[..., bytes]
) -> None:
    store, bucket = object_store
    png = make_png()
    for name, content in (
        ("shards/a/0.tar", tar_of(("0.png", png))),
        ("shards/b/0.tar", tar_of(("1.png", png))),
        ("photos/cats/1.png", png),
        ("photos/dogs/2.png", png),
        ("photos/notes.txt", b"x"),
    ):
        store.filesystem.pipe_file(f"{bucket}/{name}", content)
    sources = (f"s3://{bucket}/shards/*/*.tar", f"s3://{bucket}/photos")
    data = DataConfig(sources=sources, **DATA)
    inputs = list_inputs(data, open_storage(f"s3://{bucket}/root"))
    assert [shard.name for shard in inputs.shards] == [
        "a/0.tar", "b/0.tar", "files-0000-of-0001",
    ]  # fmt: skip
    assert [file.name for file in inputs.shards[2].files] == ["cats/1.png", "dogs/2.png"]
    assert inputs.ignored == ["notes.txt"]


def test_what_is_known_is_not_read_again(object_store: Any, make_png: Callable[..., bytes]) -> None:
    store, bucket = object_store
    for k in range(3):
        content = tar_of((f"{k}.png", make_png(k)))
        store.filesystem.pipe_file(f"{bucket}/in/{k}.tar", content)
    data = DataConfig(sources=(f"s3://{bucket}/in/*.tar",), **DATA)
    storage = open_storage(f"s3://{bucket}/root")

    def tars_read() -> list[str]:
        return sorted(path for path in store.read() if path.endswith(".tar"))

    unread = list_inputs(data, storage, read_remote=False)
    assert [shard.sha256 for shard in unread.shards] == [None] * 3
    assert tars_read() == []
    known = list_inputs(data, storage).shards
    assert tars_read() == [f"/{bucket}/in/{k}.tar" for k in range(3)]
    assert list_inputs(data, storage).shards == known
    assert len(tars_read()) == 3
    # The same name and size, other content.
    store.filesystem.pipe_file(f"{bucket}/in/1.tar", tar_of(("9.png", make_png(1))))
    assert list_inputs(data, storage).shards[1].sha256 != known[1].sha256
    assert tars_read()[1:3] == [f"/{bucket}/in/1.tar"] * 2


def files_of(format_: str, make_png: Callable[..., bytes]) -> dict[str, bytes]:
    """Files of a format with 8 items, by name."""
    pngs = {f"{'cats' if k % 2 else 'dogs'}/{k}.png": make_png(k) for k in range(8)}
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8), np.uint8)
    sequences = np.random.default_rng(0).normal(size=(8, 2, 16)).astype(np.float32)
    match format_:
        case "tar":
            return {"a.tar": tar_of(*pngs.items())}
        case "files":
            return pngs
        case "zip":
            with zipfile.ZipFile(buffer, "w") as archive:
                for name, content in pngs.items():
                    archive.writestr(name, content)
        case "parquet":
            images = [{"bytes": content, "path": name} for name, content in pngs.items()]
            pq.write_table(pa.table({"image": images, "label": [0, 1] * 4}), buffer)
        case "idx":
            images = b"\0\0\x08\x03" + struct.pack(">3I", *pixels.shape) + pixels.tobytes()
            labels = b"\0\0\x08\x01" + struct.pack(">I", 8) + bytes([0, 1] * 4)
            return {
                "images-idx3-ubyte.gz": gzip.compress(images),
                "labels-idx1-ubyte": labels,
            }
        case "npz":
            np.savez(buffer, x=sequences, label=np.arange(8) % 2)
        case "npy":
            np.save(buffer, sequences)
    return {f"a.{format_}": buffer.getvalue()}


@pytest.mark.parametrize("format_", ["tar", "files", "zip", "parquet", "idx", "npz", "npy"])
def test_the_same_bytes_from_and_to_a_bucket_as_on_a_disk(
    tmp_path: Any, object_store: Any, make_png: Callable[..., bytes], format_: str
) -> None:
    store, bucket = object_store
    for name, content in files_of(format_, make_png).items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        store.filesystem.pipe_file(f"{bucket}/in/{name}", content)
    kind: dict[str, Any] = {"sequence_shape": (2, 16)} if format_ in ("npz", "npy") else IMAGES
    found = []
    for source, root in (
        (f"{tmp_path}/in", str(tmp_path / "root")),
        (f"s3://{bucket}/in", f"s3://{bucket}/root"),
    ):
        data = DataConfig(sources=(source,), **SPLITS, **kind)
        storage = open_storage(root)
        (shard,) = list_inputs(data, storage).shards
        assert missing_units([shard], data, storage) == [shard]
        manifest = preprocess_shard(shard, data, storage)
        assert missing_units([shard], data, storage) == []
        directory = unit_directory(shard, data)
        names = storage.list(directory)
        found.append((directory, manifest, {n: storage.read(f"{directory}/{n}") for n in names}))
    assert found[0] == found[1]
    train = found[0][1]["splits"]["train"]
    assert (train["count"], train["unlabelled"]) == (8, 8 if format_ in ("npy", "tar") else 0)
    assert found[0][1]["refused"] == []


def test_an_object_that_changes_while_it_is_read_is_noticed(
    object_store: Any, make_png: Callable[..., bytes]
) -> None:
    store, bucket = object_store
    store.filesystem.pipe_file(f"{bucket}/a.tar", tar_of(("0.png", make_png(0))))
    data = DataConfig(sources=(f"s3://{bucket}/a.tar",), **DATA)
    storage = open_storage(f"s3://{bucket}/root")
    (shard,) = list_inputs(data, storage).shards
    store.filesystem.pipe_file(f"{bucket}/a.tar", tar_of(("0.png", make_png(1))))
    with pytest.raises(DataError, match="changed since the run was planned"):
        preprocess_shard(shard, data, storage)
    assert missing_units([shard], data, storage) == [shard]
