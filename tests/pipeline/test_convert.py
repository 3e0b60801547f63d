import errno
import gzip
import io
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.convert import preprocess_shard
from pipeline.errors import DataError, StorageError
from pipeline.identities import InputFile
from pipeline.settings import DataConfig
from pipeline.sources import InputShard, list_inputs
from pipeline.storage import LocalStorage
from pipeline.units import SPLITS, missing_units, unit_directory, unit_key

Members = list[tuple[str, bytes]]
DATA = DataConfig(
    sources=("x",), resolution=8, mode="L", validation_fraction=0.2, test_fraction=0.2
)


class Result:
    """A unit as it lies on disk."""

    def __init__(self, root: Path, directory: str, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = root / directory, manifest

    def tables(self) -> dict[str, list[pa.Table]]:
        """Through plain pyarrow."""
        found: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
        for file in self.manifest["files"]:
            table = pa.ipc.open_file(str(self.directory / file["file"])).read_all()
            assert table.num_rows == file["count"]
            found[file["split"]].append(table)
        return found

    def rows(self) -> dict[str, tuple[np.ndarray, Any]]:
        """(item, label) by source."""
        return {
            table["source"][row].as_py(): (
                table.column(0).chunk(0).to_numpy_ndarray()[row],
                table["label"][row].as_py(),
            )
            for tables in self.tables().values()
            for table in tables
            for row in range(table.num_rows)
        }

    def contents(self) -> dict[str, bytes]:
        """Every file but the manifest."""
        paths = [p for p in self.directory.iterdir() if p.name != "manifest.json"]
        return {path.name: path.read_bytes() for path in paths}

    @property
    def refused(self) -> list[tuple[str, str]]:
        return [(item["source"], item["reason"]) for item in self.manifest["refused"]]


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Result]:
    """Converts the only shard of a source into a root of its own."""
    roots = iter(range(100))

    def run(source: Path, threads: int = 1, **settings: Any) -> Result:
        data = DATA.model_copy(update={"sources": (str(source),), **settings})
        storage = LocalStorage(str(tmp_path / f"root-{next(roots)}"))
        (shard,) = list_inputs(data, storage).shards
        manifest = preprocess_shard(shard, data, storage, threads)
        return Result(Path(storage.uri), unit_directory(shard, data), manifest)

    return run


@pytest.fixture
def convert_tar(
    tmp_path: Path, make_tar: Callable[..., Path], convert: Callable[..., Result]
) -> Callable[..., Result]:
    """Converts a tar shard with these members."""

    def run(members: Members, **options: Any) -> Result:
        return convert(make_tar(tmp_path / "s.tar", members), **options)

    return run


def test_every_image_arrives_once_with_its_label(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    members: Members = []
    for k in range(40):
        members += [(f"{k:03d}.png", make_png(k)), (f"{k:03d}.cls", str(k % 3).encode())]
    result = convert_tar(members)
    rows = result.rows()
    assert sorted(rows) == [f"s.tar/{k:03d}.png" for k in range(40)]
    for k in range(40):
        pixels, label = rows[f"s.tar/{k:03d}.png"]
        expected = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        assert np.array_equal(pixels[0], expected)
        assert label == k % 3
    counts = [result.manifest["splits"][split]["count"] for split in SPLITS]
    assert sum(counts) == 40
    assert min(counts) > 0


def test_the_layout_is_what_the_docs_say(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    result = convert_tar([("a.png", make_png(1)), ("a.cls", b"5")], mode="RGB")
    (table,) = (table for tables in result.tables().values() for table in tables)
    assert table.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), [3, 8, 8])
    assert table.schema.field("label").type == pa.int64()
    assert table["source"].to_pylist() == ["s.tar/a.png"]


@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_input_gives_the_same_bytes_on_any_number_of_threads(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes], threads: int
) -> None:
    members = [(f"{k}.png", make_png(k) if k % 7 else b"broken") for k in range(60)]
    one, many = convert_tar(members), convert_tar(members, threads=threads)
    assert one.contents() == many.contents()
    assert one.manifest == many.manifest


def test_an_image_keeps_its_split_whatever_is_around_it(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    def splits(members: Members) -> dict[str, str]:
        return {
            source: split
            for split, tables in convert_tar(members).tables().items()
            for table in tables
            for source in table["source"].to_pylist()
        }

    few = splits([(f"{k}.png", make_png(k)) for k in range(10)])
    many = splits([(f"{k}.png", make_png(k)) for k in range(30)])
    assert few == {source: many[source] for source in few}


def test_an_input_shard_is_split_at_the_target_size(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    members = [(f"{k:03d}.png", make_png(k, (64, 64, 3))) for k in range(25)]
    settings = {"mode": "RGB", "resolution": 64, "shard_bytes": 1 << 16}
    nothing_held_out = {"validation_fraction": 0.0, "test_fraction": 0.0}
    result = convert_tar(members, **settings, **nothing_held_out)
    assert [file["count"] for file in result.manifest["files"]] == [5] * 5
    assert all(file["bytes"] < (1 << 16) + 4096 for file in result.manifest["files"])
    order = [s for table in result.tables()["train"] for s in table["source"].to_pylist()]
    assert order == [f"s.tar/{k:03d}.png" for k in range(25)]


def test_class_names_are_kept_as_names(
    tmp_path: Path, convert: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    for k, name in enumerate(("cats", "dogs", "cats")):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{k}.png").write_bytes(make_png(k))
    result = convert(tmp_path / "in", validation_fraction=0.0, test_fraction=0.0)
    ((table,),) = (tables for tables in result.tables().values() if tables)
    assert table["label"].chunk(0).dictionary.to_pylist() == ["cats", "dogs"]
    labels = {source: label for source, (_, label) in result.rows().items()}
    assert labels == {"cats/0.png": "cats", "dogs/1.png": "dogs", "cats/2.png": "cats"}


def test_bad_images_are_listed_not_dropped(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    good = make_png(1)
    result = convert_tar(
        [("0.png", good), ("1.png", b""), ("2.png", good[: len(good) // 2]), ("3.jpg", b"no")]
    )
    assert len(result.rows()) == 1
    assert result.refused == [
        ("s.tar/1.png", "empty"),
        ("s.tar/2.png", "truncated"),
        ("s.tar/3.jpg", "not_an_image"),
    ]
    assert all(item["detail"] for item in result.manifest["refused"])


def test_a_decompression_bomb_is_one_refused_image(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    def huge(side: int) -> bytes:  # a header that promises more pixels than it has
        content = bytearray(make_png(0))
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return bytes(content)

    result = convert_tar([("0.png", make_png(1)), ("1.png", huge(9000)), ("2.png", huge(60000))])
    assert result.refused == [
        ("s.tar/1.png", "too_many_pixels"),
        ("s.tar/2.png", "too_many_pixels"),
    ]


def test_filters_leave_out_and_count(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    members: Members = [("readme.md", b"about")]
    for k in range(6):
        members += [(f"{k}.png", make_png(k, (4 + 2 * k, 30))), (f"{k}.cls", str(k % 3).encode())]
    result = convert_tar(members, include_labels=(0, "2"), min_resolution_px=8)
    assert sorted(result.rows()) == ["s.tar/2.png", "s.tar/3.png", "s.tar/5.png"]
    assert result.manifest["left_out"] == {"label": 2, "name": 1, "resolution": 1}
    assert result.refused == []


def test_labels_can_be_required(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    members = [("0.png", make_png(0)), ("0.cls", b"1"), ("1.png", make_png(1))]
    assert convert_tar(members).refused == []
    assert convert_tar(members, require_labels=True).refused == [("s.tar/1.png", "label_missing")]


@pytest.mark.parametrize(
    ("included", "kept"),
    [(("007",), [0]), ((7,), [0]), (("None",), [1]), ((-1,), [2, 3]), ((" None ", "7"), [0, 1])],
)
def test_labels_to_include_are_read_as_labels_are(
    convert_tar: Callable[..., Result],
    make_png: Callable[..., bytes],
    included: tuple[int | str, ...],
    kept: list[int],
) -> None:
    members: Members = [(f"{k}.png", make_png(k)) for k in range(4)]
    for k, label in enumerate((b"007", b"None", b"-1")):
        members.insert(2 * k, (f"{k}.cls", label))
    result = convert_tar(members, include_labels=included)
    assert sorted(result.rows()) == [f"s.tar/{k}.png" for k in kept]
    assert result.manifest["left_out"] == {"label": 4 - len(kept)}


def test_images_that_labels_lack_for_are_refused_once(
    tmp_path: Path, convert: Callable[..., Result]
) -> None:
    def idx(array: np.ndarray) -> bytes:
        sizes = struct.pack(f">{array.ndim}I", *array.shape)
        return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()

    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8), np.uint8)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a-images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "in" / "a-labels-idx1-ubyte").write_bytes(idx(np.zeros(50, np.uint8)))
    for settings in ({}, {"require_labels": True}):
        result = convert(tmp_path / "in", **settings)
        assert len(result.rows()) == 50
        refused = [(item["source"], item["count"]) for item in result.manifest["refused"]]
        assert refused == [("a-images-idx3-ubyte/labels", 50)]


def test_a_loose_sequence_is_stored_or_refused_as_one_in_a_tar_is(
    tmp_path: Path, make_tar: Callable[..., Path], convert: Callable[..., Result]
) -> None:
    def npy(version: tuple[int, int]) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ones((2, 16), np.float32), version)
        return buffer.getvalue()

    files = {f"{version}.npy": npy((version, 0)) for version in (1, 2, 3)}
    files |= {"cut.npy": npy((1, 0))[:-1], "more.npy": npy((1, 0)) + b"x", "none.npy": b""}
    files |= {"gone.npy": npy((1, 0))[:50], "zipped.npy": gzip.compress(npy((1, 0)))}
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    settings = {"resolution": None, "sequence_shape": (2, 16)}
    loose = convert(tmp_path / "in", **settings)
    packed = convert(make_tar(tmp_path / "s.tar", list(files.items())), **settings)
    assert sorted(packed.rows()) == [f"s.tar/{name}" for name in sorted(loose.rows())]
    assert sorted(loose.rows()) == ["1.npy", "2.npy", "3.npy", "zipped.npy"]
    assert {(f"s.tar/{name}", reason) for name, reason in loose.refused} == set(packed.refused)
    assert dict(loose.refused) == {
        "cut.npy": "truncated",
        "gone.npy": "truncated",
        "more.npy": "undecodable",
        "none.npy": "empty",
    }


@pytest.mark.parametrize("count", [2, 50])
def test_the_directory_of_an_array_is_its_class_whatever_its_size(
    tmp_path: Path, convert: Callable[..., Result], count: int
) -> None:
    settings = {"resolution": None, "sequence_shape": (2, 16)}
    array = np.random.default_rng(0).normal(size=(count, 2, 16)).astype(np.float32)
    for name in ("worn", "x" * 101):
        (tmp_path / f"of {name}" / name).mkdir(parents=True)
        np.save(tmp_path / f"of {name}" / name / "a.npy", array)
    for field, label in (("label", "worn"), ("", None)):
        rows = convert(tmp_path / "of worn", label_field=field, **settings).rows()
        assert [found for _, found in rows.values()] == [label] * count
    (refused,) = convert(tmp_path / f"of {'x' * 101}", **settings).manifest["refused"]
    assert refused["source"] == f"{'x' * 101}/a.npy"
    assert refused["detail"].startswith("its directory is no class: a label has 1 to 100")
    assert refused.get("hides_more", False) == (count > 2)


def test_a_sequence_has_the_same_split_and_hash_in_whatever_it_comes(
    tmp_path: Path, make_tar: Callable[..., Path], convert: Callable[..., Result]
) -> None:
    values = np.random.default_rng(0).normal(size=(60, 2, 16)).astype(np.float32)

    def npy(item: np.ndarray, version: tuple[int, int]) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, item, version)
        return buffer.getvalue()

    (tmp_path / "loose").mkdir()
    for k, item in enumerate(values):
        (tmp_path / "loose" / f"{k:02d}.npy").write_bytes(npy(item, (2, 0)))
    members = [(f"{k:02d}.npy", npy(item, (1, 0))) for k, item in enumerate(values)]
    np.savez(tmp_path / "a.npz", values=values)
    wide = values.astype(np.float64).reshape(60, -1).tolist()
    pq.write_table(pa.table({"values": wide}), tmp_path / "a.parquet")
    settings = {"resolution": None, "sequence_shape": (2, 16)}
    sources = (tmp_path / "loose", make_tar(tmp_path / "s.tar", members), tmp_path / "a.npz")
    found = []
    for source in (*sources, tmp_path / "a.parquet"):
        result = convert(source, **settings)
        index = pa.ipc.open_file(result.directory / result.manifest["index"]["file"]).read_all()
        hashes = index.column("content").chunk(0).to_numpy_ndarray()
        splits = {split: facts["count"] for split, facts in result.manifest["splits"].items()}
        found.append((splits, sorted(row.tobytes() for row in hashes)))
    assert sum(found[0][0].values()) == 60
    assert found[1:] == found[:1] * 3


def test_a_file_that_lacks_what_the_config_names_is_named(
    tmp_path: Path, convert: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    pq.write_table(pa.table({"image": [make_png(1)], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet has no column klass of labels; .* label\."):
        convert(tmp_path / "a.parquet", label_field="klass")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"^b\.parquet has no columns that could hold the images"):
        convert(tmp_path / "b.parquet")
    np.savez(tmp_path / "c.npz", a=np.zeros((1, 2, 8)), b=np.zeros((1, 2, 8)))
    with pytest.raises(DataError, match=r"^c\.npz does not tell which array holds the sequences"):
        convert(tmp_path / "c.npz", resolution=None, sequence_shape=(2, 8))


def test_animated_files_give_their_first_frame_and_are_counted(
    convert_tar: Callable[..., Result],
) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (10, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    result = convert_tar([("a.png", buffer.getvalue())])
    ((pixels, _),) = result.rows().values()
    assert (pixels == 10).all()
    assert result.manifest["animated"] == 1


def test_the_sums_are_those_of_the_pixels(
    convert_tar: Callable[..., Result], make_png: Callable[..., bytes]
) -> None:
    result = convert_tar([(f"{k}.png", make_png(k, (8, 8, 3))) for k in range(9)], mode="RGB")
    pixels = np.stack([item for item, _ in result.rows().values()]).astype(np.int64)
    expected = np.stack([pixels.sum((0, 2, 3)), (pixels**2).sum((0, 2, 3))], axis=1)
    found = sum(np.array(result.manifest["splits"][s]["channel_sums"]) for s in SPLITS)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("side", [257, 258])  # the squares of 257 x 257 whites are below 2^32
def test_the_sums_of_large_white_images_do_not_wrap(
    side: int, convert_tar: Callable[..., Result]
) -> None:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 255).save(buffer, "PNG")
    result = convert_tar([("a.png", buffer.getvalue())], resolution=side)
    found = sum(np.array(result.manifest["splits"][s]["channel_sums"]) for s in SPLITS)
    assert np.array_equal(found, [[255 * side**2, 255**2 * side**2]])


def test_a_compressed_shard_that_is_cut_short_lists_its_tail(
    tmp_path: Path,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    convert: Callable[..., Result],
) -> None:
    members = [(f"{k:02d}.png", make_png(k, (64, 64))) for k in range(20)]
    content = gzip.compress(make_tar(tmp_path / "a.tar", members).read_bytes())
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content[: len(content) // 2])
    result = convert(path)
    assert 5 < len(result.rows()) < 15
    assert result.refused[-1] in {
        ("a.tar.gz", "unreadable_tail"),
        (f"a.tar.gz/{len(result.rows()):02d}.png", "truncated"),
    }


def test_a_shard_that_changed_since_the_plan_is_refused(
    tmp_path: Path, make_tar: Callable[..., Path], make_png: Callable[..., bytes]
) -> None:
    path = make_tar(tmp_path / "s.tar", [("0.png", make_png(0))])
    file = InputFile("s.tar", str(path), path.stat().st_size, None, "0" * 64)
    storage = LocalStorage(str(tmp_path / "root"))
    with pytest.raises(DataError, match="changed since the run was planned"):
        preprocess_shard(InputShard("s.tar", "tar", (file,)), DATA, storage)
    assert not list((tmp_path / "root").rglob("manifest.json"))


@pytest.mark.parametrize("members", [[], [("readme.txt", b"hello")]])
def test_a_shard_without_images_is_listed(
    convert_tar: Callable[..., Result], members: Members
) -> None:
    assert convert_tar(members).refused == [("s.tar", "empty")]


def shard(sha256: str, uri: str = "/somewhere/s.tar") -> InputShard:
    return InputShard("s.tar", "tar", (InputFile("s.tar", uri, 1, None, sha256),))


def test_the_key_follows_content_and_transform() -> None:
    key = unit_key(shard("ab"), DATA)
    assert unit_key(shard("ab", "/elsewhere/s.tar"), DATA) == key
    assert unit_key(shard("cd"), DATA) != key
    for changed in ({"resolution": 16}, {"fit": "pad"}, {"resample": "area"}, {"shard_bytes": 1}):
        assert unit_key(shard("ab"), DATA.model_copy(update=changed)) != key
    for same in ({"sources": ("other",)}, {"max_bad_fraction": 0.5}, {"drop_duplicates": True}):
        assert unit_key(shard("ab"), DATA.model_copy(update=same)) == key


def test_a_unit_is_missing_until_its_manifest_is_there(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    one, two, unread = shard("ab"), shard("cd"), InputShard("u", "tar", ())
    unread = InputShard("u.tar", "tar", (InputFile("u.tar", "s3://b/u.tar", 1, None, None),))
    shards = [one, two, unread]
    assert missing_units(shards, DATA, storage) == shards
    storage.create(f"{unit_directory(one, DATA)}/train-00000.arrow", b"")
    assert missing_units(shards, DATA, storage) == shards
    storage.create(f"{unit_directory(one, DATA)}/manifest.json", b"{}")
    assert missing_units(shards, DATA, storage) == [two, unread]


class SmallDisk(io.FileIO):
    """A new file on a disk that has room for so many bytes, of all files together."""

    left = 0

    def write(self, content: Any, /) -> int:
        part = memoryview(content).cast("B")[: SmallDisk.left]
        if not part.nbytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        SmallDisk.left -= part.nbytes
        return super().write(part)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_disk_that_fills_up_in_a_write_leaves_no_half_unit_and_no_litter(
    tmp_path: Path,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    path = make_tar(tmp_path / "s.tar", [(f"{k:02d}.png", make_png(k)) for k in range(60)])
    data = DATA.model_copy(update={"sources": (str(path),)})
    expected, storage = LocalStorage(str(tmp_path / "expected")), LocalStorage(str(tmp_path / "r"))
    (unit,) = list_inputs(data, expected).shards
    preprocess_shard(unit, data, expected)
    directory = unit_directory(unit, data)
    files = {p.name: p.read_bytes() for p in Path(expected.uri, directory).iterdir()}

    open_any = Path.open

    def open_small(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "xb":
            return io.BufferedWriter(SmallDisk(path, mode))
        return open_any(path, mode, *args, **options)

    SmallDisk.left = int(share * sum(map(len, files.values())))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_small)
        with pytest.raises(StorageError, match="No space left on device"):
            preprocess_shard(unit, data, storage)
        found = list(Path(storage.uri, directory).iterdir())
        assert {p.name: p.read_bytes() for p in found}.items() <= files.items()
        assert "manifest.json" not in {p.name for p in found}
        assert missing_units([unit], data, storage) == [unit]
        SmallDisk.left = 1 << 30
        preprocess_shard(unit, data, storage)
    assert {p.name: p.read_bytes() for p in Path(storage.uri, directory).iterdir()} == files


KILLED_AT = """
import os, signal, sys
from pipeline.convert import preprocess_shard
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage
data = DataConfig.model_validate_json(sys.argv[1])
storage = LocalStorage(sys.argv[2])
(shard,) = list_inputs(data, storage).shards
left, link = int(sys.argv[3]), os.link
def count(source, target):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    link(source, target)
os.link = count
preprocess_shard(shard, data, storage)
"""


@pytest.mark.parametrize("link", [1, 3, 5])
def test_a_kill_in_a_write_leaves_nothing_that_the_next_attempt_does_not_remove(
    tmp_path: Path, make_tar: Callable[..., Path], make_png: Callable[..., bytes], link: int
) -> None:
    path = make_tar(tmp_path / "s.tar", [(f"{k:02d}.png", make_png(k)) for k in range(60)])
    data = DATA.model_copy(update={"sources": (str(path),)})
    expected, storage = LocalStorage(str(tmp_path / "expected")), LocalStorage(str(tmp_path / "r"))
    (unit,) = list_inputs(data, expected).shards
    preprocess_shard(unit, data, expected)
    arguments = [data.model_dump_json(), storage.uri, str(link)]
    done = subprocess.run([sys.executable, "-c", KILLED_AT, *arguments], timeout=60)
    assert done.returncode == -signal.SIGKILL
    directory = Path(storage.uri, unit_directory(unit, data))
    assert any(p.name.startswith(".staged-") for p in directory.iterdir())
    preprocess_shard(unit, data, storage)
    names = {p.name: p.read_bytes() for p in directory.iterdir()}
    wanted = Path(expected.uri, unit_directory(unit, data)).iterdir()
    assert names == {p.name: p.read_bytes() for p in wanted}
