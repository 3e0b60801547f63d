import hashlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pipeline.config import load_config
from pipeline.errors import DataError
from pipeline.settings import DataConfig
from pipeline.sources import FILES_PER_BUCKET, Inputs, keep_to, list_inputs, loose_files
from pipeline.storage import LocalStorage


@pytest.fixture
def inputs_of(tmp_path: Path) -> Callable[..., Inputs]:
    """Lists what sources below `tmp_path` hold."""

    def run(*sources: str, **settings: object) -> Inputs:
        paths = tuple(s if "://" in s else str(tmp_path / s) for s in sources)
        kind = {} if "sequence_shape" in settings else {"resolution": 8}
        data = DataConfig.model_validate({"sources": paths, **kind, **settings})
        return list_inputs(data, LocalStorage(str(tmp_path / "root")))

    return run


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_finds_shards_by_name_below_the_fixed_part(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "b.tar", b"b")
    write(tmp_path / "deep" / "a.tar", b"a")
    shards = inputs_of("**/*.tar").shards
    assert [shard.name for shard in shards] == ["b.tar", "deep/a.tar"]
    assert len({shard.sha256 for shard in shards}) == 2


def test_a_directory_gives_all_its_formats(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    for name in ("1.tar", "2.tar.gz", "3.tgz", "4.zip", "5.parquet", "train-images-idx3-ubyte.gz"):
        write(tmp_path / "in" / name)
    write(tmp_path / "in" / "train-labels-idx1-ubyte.gz")
    write(tmp_path / "in" / "cats" / "1.JPG")
    for name in ("notes.txt", "cats/2.heic", ".DS_Store", "__MACOSX/._1.jpg"):
        write(tmp_path / "in" / name)
    found = inputs_of("in")
    assert {shard.name: shard.format for shard in found.shards} == {
        "1.tar": "tar", "2.tar.gz": "tar", "3.tgz": "tar", "4.zip": "zip", "5.parquet": "parquet",
        "train-images-idx3-ubyte.gz": "idx", "files-0000-of-0001": "files",
    }  # fmt: skip
    idx = next(shard for shard in found.shards if shard.format == "idx")
    assert [file.name for file in idx.files] == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]
    assert found.ignored == ["cats/2.heic", "notes.txt"]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"),
        ("t10k-images.idx3-ubyte.gz", "t10k-labels.idx1-ubyte"),
        ("train-images-idx4-ubyte", "train-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels-idx1-ubyte"),
        ("TRAIN-IMAGES-IDX3-UBYTE.GZ", "TRAIN-LABELS-IDX1-UBYTE"),
        ("Train-Images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ],
)
@pytest.mark.parametrize("directory", ["in", "İ images"])
def test_the_labels_of_an_idx_file_are_found_beside_it(
    tmp_path: Path, inputs_of: Callable[..., Inputs], directory: str, images: str, labels: str
) -> None:
    write(tmp_path / directory / images)
    write(tmp_path / directory / labels, b"one")
    (shard,) = inputs_of(f"{directory}/*[uU][bB]*").shards
    assert [file.name for file in shard.files] == [images, labels]
    before = shard.sha256
    write(tmp_path / directory / labels, b"two")
    assert inputs_of(f"{directory}/*[uU][bB]*").shards[0].sha256 != before


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"),
        ("İ/images.idx3-ubyte", "İ/labels-idx1-ubyte"),
        ("TRAIN-IMAGES-IDX3-UBYTE", "TRAIN-LABELS-IDX1-UBYTE"),
    ],
)
def test_an_idx_file_named_alone_brings_its_labels(
    tmp_path: Path, inputs_of: Callable[..., Inputs], images: str, labels: str
) -> None:
    write(tmp_path / images)
    write(tmp_path / labels)
    (shard,) = inputs_of(images).shards
    assert len(shard.files) == 2


def test_names_that_differ_in_case_alone_are_paired_by_it(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    for word in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        for start in ("Train", "train"):
            write(tmp_path / "in" / f"{start}-{word}")
    pairs = [[file.name[:5] for file in shard.files] for shard in inputs_of("in").shards]
    assert pairs == [["Train", "Train"], ["train", "train"]]


def test_labels_that_lie_elsewhere_than_their_images_are_told(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "in" / "images" / "train-images-idx3-ubyte")
    labels = write(tmp_path / "in" / "labels" / "train-labels-idx1-ubyte")
    told = rf"train-images-idx3-ubyte has no labels beside it, and {labels} no images\. Name them"
    with pytest.raises(DataError, match=told):
        inputs_of("in")
    assert [len(shard.files) for shard in inputs_of("in/images").shards] == [1]


def test_labels_that_are_there_packed_as_well_are_no_fault(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"]
    for name in (*names, "t10k-images-idx3-ubyte"):
        write(tmp_path / "in" / name)
    assert sorted(len(shard.files) for shard in inputs_of("in").shards) == [1, 2]


def test_the_labels_of_an_idx_file_are_those_of_its_own_source(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    for name in ("a/images-idx3-ubyte", "b/images-idx3-ubyte", "b/labels-idx1-ubyte"):
        write(tmp_path / name)
    first, second = (
        [Path(f.uri).relative_to(tmp_path).as_posix() for f in shard.files]
        for shard in sorted(inputs_of("a", "b").shards, key=lambda shard: shard.files[0].uri)
    )
    assert first == ["a/images-idx3-ubyte"]
    assert second == ["b/images-idx3-ubyte", "b/labels-idx1-ubyte"]


def test_labels_without_their_images_are_nothing(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "in" / "train-labels-idx1-ubyte")
    for pattern in ("in", "in/train-labels-idx1-ubyte", "in/*"):
        with pytest.raises(DataError, match="There are no images at"):
            inputs_of(pattern)
    write(tmp_path / "in" / "1.png")
    assert inputs_of("in").ignored == ["train-labels-idx1-ubyte"]
    write(tmp_path / "in" / "train-images-idx3-ubyte")
    found = inputs_of("in/train-labels-idx1-ubyte", "in/train-images-idx3-ubyte")
    assert [len(shard.files) for shard in found.shards] == [2]
    assert found.ignored == []


def test_sequences_take_arrays_and_images_do_not(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "many.npy", bytes(100_000))
    write(tmp_path / "one.npy", bytes(200))
    for name in ("more.npz", "rows.parquet", "photo.png"):
        write(tmp_path / name)
    found = inputs_of("*.*", sequence_shape=(2, 16))
    assert {shard.name: shard.format for shard in found.shards} == {
        "files-0000-of-0001": "files", "many.npy": "npy", "more.npz": "npz",
        "rows.parquet": "parquet",
    }  # fmt: skip
    assert found.ignored == ["photo.png"]
    assert {s.format for s in inputs_of("*.*").shards} == {"files", "parquet"}


def test_a_new_file_changes_one_bucket(tmp_path: Path, inputs_of: Callable[..., Inputs]) -> None:
    for k in range(FILES_PER_BUCKET * 3):
        write(tmp_path / "in" / f"{k:05d}.png", str(k).encode())
    before = {shard.name: shard.sha256 for shard in inputs_of("in").shards}
    assert len(before) == 4
    write(tmp_path / "in" / "new.png")
    after = {shard.name: shard.sha256 for shard in inputs_of("in").shards}
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 1


def test_what_is_left_out_is_as_if_it_were_not_there(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    def sha256_of(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    write(tmp_path / "in" / "1.tar", b"one")
    for k in range(FILES_PER_BUCKET):
        write(tmp_path / "in" / f"{k:05d}.png", str(k).encode())
    before = inputs_of("in").shards
    write(tmp_path / "in" / "2.tar", b"two")
    write(tmp_path / "in" / "new.png", b"new")
    assert [shard.name for shard in inputs_of("in").shards] == [
        "1.tar", "2.tar", "files-0000-of-0002", "files-0001-of-0002"
    ]  # fmt: skip
    left_out = (sha256_of(b"two"), sha256_of(b"new"))
    assert inputs_of("in", leave_out=left_out).shards == before
    write(tmp_path / "one" / "new.png", b"new")
    with pytest.raises(DataError, match=r"All input shards are named by data\.leave_out"):
        inputs_of("one", leave_out=left_out)


def test_the_input_is_found_as_it_was_among_what_came_later(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "in" / "1.tar", b"one")
    for k in range(FILES_PER_BUCKET):
        write(tmp_path / "in" / f"{k:05d}.png", str(k).encode())
    before = inputs_of("in")
    shards = {shard.name: shard.sha256 for shard in before.shards}
    loose = loose_files(before.shards)
    assert len(loose) == FILES_PER_BUCKET
    write(tmp_path / "in" / "2.tar", b"one")  # the same content under another name
    write(tmp_path / "in" / "new.png", b"0")
    later = inputs_of("in")
    assert len(later.shards) == 4
    assert keep_to(later, shards, loose) == before
    assert keep_to(later, shards, {}) is None
    write(tmp_path / "in" / "1.tar", b"other")
    assert keep_to(inputs_of("in"), shards, loose) is None
    write(tmp_path / "in" / "1.tar", b"one")
    (tmp_path / "in" / "00000.png").unlink()
    assert keep_to(inputs_of("in"), shards, loose) is None


def test_a_renamed_loose_file_is_noticed(tmp_path: Path, inputs_of: Callable[..., Inputs]) -> None:
    path = write(tmp_path / "in" / "cats" / "1.png")
    (before,) = inputs_of("in").shards
    (tmp_path / "in" / "dogs").mkdir()
    path.rename(tmp_path / "in" / "dogs" / "1.png")
    (after,) = inputs_of("in").shards
    assert before.sha256 != after.sha256


def test_a_class_is_in_the_hash_of_an_array_where_its_name_does_not_tell_it(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    content = bytes(100_000)
    for name in ("a/1.npy", "b/1.npy", "b/cats/2.npy"):
        write(tmp_path / name, content)
    shards = inputs_of("a", "b", sequence_shape=(2, 16)).shards
    whole = str(tmp_path / "b" / "1.npy").lstrip("/")
    assert {shard.name: shard.files[0].class_name for shard in shards} == {
        "1.npy": "", "cats/2.npy": "cats", whole: "",
    }  # fmt: skip
    plain = hashlib.sha256(content).hexdigest()
    assert {shard.name for shard in shards if shard.sha256 == plain} == {"1.npy", "cats/2.npy"}


def test_files_that_are_nothing_are_counted_once_each(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    for name in (
        "a/1.png",
        "a/notes.txt",
        "a/deep/2.png",
        "a/deep/x.txt",
        "b/1.png",
        "b/notes.txt",
    ):
        write(tmp_path / name)
    ignored = inputs_of("a", "b", "a/deep").ignored
    assert ignored == ["deep/x.txt", "notes.txt", "notes.txt"]


def test_nothing_at_the_path(inputs_of: Callable[..., Inputs]) -> None:
    for pattern in ("none.tar", "*.tar", "nowhere/"):
        with pytest.raises(DataError, match=r"There are no images at .*\. Check data\.sources"):
            inputs_of(pattern)


def test_a_directory_without_images_is_nothing(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "in" / "notes.txt")
    with pytest.raises(DataError, match="There are no images at"):
        inputs_of("in")


def test_files_that_are_all_empty(tmp_path: Path, inputs_of: Callable[..., Inputs]) -> None:
    write(tmp_path / "1.tar", b"")
    with pytest.raises(DataError, match=r"1\.tar is empty \(0 bytes\)"):
        inputs_of("*.tar")
    write(tmp_path / "2.tar", b"x")
    assert len(inputs_of("*.tar").shards) == 2


def test_a_named_file_must_tell_what_it_is(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "part-0000")
    with pytest.raises(DataError, match="does not tell by its name what it is"):
        inputs_of("part-0000")


def test_a_directory_with_the_signs_of_a_glob(tmp_path: Path) -> None:
    home = tmp_path / "[a]" / "b*"
    write(home / "1.tar")
    write(home / "in" / "2.png")
    (home / "c.toml").write_text(
        'name = "x"\n[data]\nsources = ["*.tar", "1.tar", "in"]\nresolution = 8\n'
    )
    data = load_config(home / "c.toml").data
    found = list_inputs(data, LocalStorage(str(tmp_path / "root")))
    assert [shard.name for shard in found.shards] == ["1.tar", "files-0000-of-0001"]
    assert [file.name for file in found.shards[1].files] == ["2.png"]


def test_shards_of_one_name_in_two_sources_are_told_apart(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "x" / "a.tar", b"x")
    write(tmp_path / "y" / "a.tar", b"y")
    whole = str(tmp_path / "y" / "a.tar").lstrip("/")
    assert {shard.name for shard in inputs_of("x/*.tar", "y/*.tar").shards} == {"a.tar", whole}


def test_a_file_that_two_sources_match_is_one(
    tmp_path: Path, inputs_of: Callable[..., Inputs]
) -> None:
    write(tmp_path / "a.tar")
    assert len(inputs_of("*.tar", "a.tar", ".").shards) == 1


@pytest.mark.parametrize("protocol", ["file", "local", "memory"])
def test_any_fsspec_uri(tmp_path: Path, inputs_of: Callable[..., Inputs], protocol: str) -> None:
    write(tmp_path / "in" / "a.tar", b"a")
    write(tmp_path / "in" / "deep" / "b.tar", b"b")
    write(tmp_path / "in" / "cats" / "1.png")
    local = {s.name: s.sha256 for s in inputs_of("in").shards}
    uri = f"{protocol}://{tmp_path}/in"
    if protocol == "memory":
        fsspec.filesystem("memory").put(f"{tmp_path}/in", f"{tmp_path}/in", recursive=True)
    for pattern in (uri, f"{uri}/", f"{uri}/**"):
        assert {s.name: s.sha256 for s in inputs_of(pattern).shards} == local
    assert [s.name for s in inputs_of(f"{uri}/*.tar").shards] == ["a.tar"]
    with pytest.raises(DataError, match="There are no images at"):
        inputs_of(f"{uri}/none.tar")
