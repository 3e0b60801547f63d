import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.convert import preprocess_shard
from pipeline.dataset import class_names, open_shards
from pipeline.dataset_document import check_document, make_document
from pipeline.errors import DataError, StorageError
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage
from pipeline.units import SPLITS, missing_units, read_units, unit_directory

Members = list[tuple[str, bytes]]


class DataSet:
    """Tar shards below a directory, preprocessed in this process."""

    def __init__(self, directory: Path, make_tar: Callable[..., Path]) -> None:
        self.directory, self.make_tar = directory, make_tar
        self.storage = LocalStorage(str(directory / "root"))
        self.runs = 0
        (directory / "in").mkdir()

    def add(self, name: str, members: Members) -> None:
        self.make_tar(self.directory / "in" / name, members)

    def remove(self, name: str) -> None:
        (self.directory / "in" / name).unlink()

    def document(self, **settings: Any) -> dict[str, Any]:
        options = {"mode": "L", "validation_fraction": 0.2, "test_fraction": 0.2, **settings}
        self.data = DataConfig(sources=(str(self.directory / "in"),), resolution=8, **options)
        inputs = list_inputs(self.data, self.storage)
        missing = missing_units(inputs.shards, self.data, self.storage)
        self.runs = len(missing)
        for shard in missing:
            preprocess_shard(shard, self.data, self.storage)
        units = read_units(self.storage, inputs.shards, self.data)
        document = make_document(self.data, self.storage, inputs.shards, units, inputs.ignored)
        return json.loads(json.dumps(document))

    def items(self, document: dict[str, Any], split: str) -> tuple[np.ndarray, list[int]]:
        found = open_shards(self.storage, document, document["shards"], split)
        if not len(found):
            return np.zeros((0, 1, 8, 8), np.uint8), []
        ids = np.arange(len(found))
        return found.gather(ids), found.labels_of(ids).tolist()


@pytest.fixture
def data_set(tmp_path: Path, make_tar: Callable[..., Path]) -> DataSet:
    return DataSet(tmp_path, make_tar)


def labelled(make_png: Callable[..., bytes], numbers: range, prefix: str = "") -> Members:
    return [
        member
        for k in numbers
        for member in ((f"{prefix}{k:03d}.png", make_png(k)), (f"{prefix}{k:03d}.cls", b"%d" % k))
    ]


def test_adds_up_what_the_units_hold(
    data_set: DataSet, make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    data_set.add("a.tar", labelled(make_png, range(30)))
    data_set.add("b.tar", [*labelled(make_png, range(30, 50)), ("x.png", b""), ("y.md", b"")])
    (tmp_path / "in" / "notes.txt").write_text("hello")
    document = data_set.document()
    assert document["schema_version"] == 2
    assert sum(document["counts"].values()) == 50
    assert document["shape"] == [1, 8, 8]
    pixels, labels = data_set.items(document, "train")
    assert len(pixels) == document["counts"]["train"]
    assert document["channel_mean"] == pytest.approx([pixels.mean()])
    assert document["channel_std"] == pytest.approx([pixels.std()])
    assert document["labels"]["train"] == {str(k): 1 for k in sorted(labels)}
    assert document["unlabelled"] == dict.fromkeys(SPLITS, 0)
    assert document["refused"]["by_reason"] == {"empty": 1}
    assert document["refused"]["items"][0]["source"] == "b.tar/x.png"
    assert document["left_out"] == {"name": 2}
    assert document["ignored_first"] == ["notes.txt"]
    assert [shard["name"] for shard in document["inputs"]] == ["a.tar", "b.tar"]
    assert document["transform"]["resample"] == "lanczos"
    assert not {"sources", "shuffle_window", "cache_bytes"} & document["transform"].keys()


def test_removing_a_shard_revives_the_twins_of_its_items(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    data_set.add("a.tar", labelled(make_png, range(20)))
    data_set.add("b.tar", labelled(make_png, range(10, 40)))  # 10 to 19 are in both
    data_set.add("c.tar", labelled(make_png, range(5, 12), "again-"))
    everything = data_set.document()
    assert sum(everything["counts"].values()) == 57
    assert "duplicate" not in everything["left_out"]

    kept = data_set.document(drop_duplicates=True)
    assert data_set.runs == 0
    assert sum(kept["counts"].values()) == 40
    assert kept["left_out"]["duplicate"] == 17
    labels = [label for split in SPLITS for label in data_set.items(kept, split)[1]]
    assert sorted(labels) == list(range(40))

    data_set.remove("a.tar")
    revived = data_set.document(drop_duplicates=True)
    assert data_set.runs == 0
    labels = [label for split in SPLITS for label in data_set.items(revived, split)[1]]
    assert sorted(labels) == list(range(5, 40))
    assert revived["left_out"]["duplicate"] == 2


@pytest.mark.parametrize(
    "names", [(b"cat", b"tabby"), (b"cat", b"7"), (b"3", b"7"), (b"3", b"cat")]
)
def test_a_class_of_twins_alone_is_none(
    data_set: DataSet, make_png: Callable[..., bytes], names: tuple[bytes, bytes]
) -> None:
    members = {f"{k:02d}.png": make_png(k % 40) for k in range(50)}
    members |= {f"{k:02d}.cls": names[k >= 40] for k in range(50)}
    data_set.add("a.tar", [(name, members[name]) for name in sorted(members)])
    document = data_set.document(drop_duplicates=True)
    assert sum(document["counts"].values()) == 40
    assert document["classes"] == (["cat"] if names[0] == b"cat" else None)
    labels = {label for split in SPLITS for label in data_set.items(document, split)[1]}
    assert labels == ({3} if document["classes"] is None else {0})


@pytest.mark.parametrize("damage", ["cut", "footer", "gone"])
def test_a_damaged_arrow_file_is_named_and_the_remedy_makes_it_anew(
    data_set: DataSet, make_png: Callable[..., bytes], damage: str
) -> None:
    data_set.add("a.tar", labelled(make_png, range(20)))
    data_set.add("b.tar", labelled(make_png, range(20, 40)))
    document = data_set.document()
    row = document["shards"][1]
    name = next(file["file"] for file in row["files"] if file["split"] == "train")
    path = Path(data_set.storage.uri, row["directory"], name)
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-500] + b"\xff" * (490 if damage == "footer" else 0))
        if damage == "footer":
            path.write_bytes(path.read_bytes() + content[-10:])
    with pytest.raises(StorageError) as caught:
        data_set.items(document, "train")
    assert f"{row['directory']}/{name} is missing or not what" in str(caught.value)
    assert f"delete the directory {row['directory']} below" in str(caught.value)
    data_set.storage.delete(row["directory"])
    assert len(data_set.items(data_set.document(), "train")[1]) == document["counts"]["train"]
    assert data_set.runs == 1


def test_class_numbers_that_are_no_numbering_are_refused_where_each_gets_an_embedding(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    members = labelled(make_png, range(20))
    data_set.add("a.tar", [*members, ("x.png", make_png(99)), ("x.cls", b"4000000000000000000")])
    document = data_set.document()
    with pytest.raises(DataError, match=r"largest, 4,000,000,000,000,000,000, and .* 21 classes"):
        class_names(document)


def test_statistics_count_an_image_once(data_set: DataSet, make_png: Callable[..., bytes]) -> None:
    data_set.add("a.tar", labelled(make_png, range(30)))
    alone = data_set.document(drop_duplicates=True)
    data_set.add("b.tar", labelled(make_png, range(12), "twin-"))
    doubled = data_set.document(drop_duplicates=True)
    for key in ("counts", "channel_mean", "channel_std", "labels", "unlabelled"):
        assert doubled[key] == alone[key], key
    assert data_set.document()["channel_mean"] != alone["channel_mean"]


def test_class_names_get_ids_over_all_units(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    def named(name: str, numbers: range) -> Members:
        return [
            member
            for k in numbers
            for member in ((f"{k}.png", make_png(k)), (f"{k}.cls", name.encode()))
        ]

    data_set.add("a.tar", named("dog", range(10)))
    data_set.add("b.tar", named("cat", range(10, 30)))
    data_set.add("c.tar", [(f"{k}.png", make_png(k)) for k in range(30, 35)])
    document = data_set.document()
    assert document["classes"] == ["cat", "dog"]
    labels = [label for split in SPLITS for label in data_set.items(document, split)[1]]
    assert [labels.count(id_) for id_ in (0, 1, -1)] == [20, 10, 5]


def test_too_many_refused_images_fail_with_the_first_ten(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    broken = [(f"z{k:02d}.png", b"no image") for k in range(12)]
    data_set.add("a.tar", labelled(make_png, range(40)) + broken)
    document = data_set.document()
    with pytest.raises(DataError) as caught:
        check_document(document, data_set.data, "/ledger.jsonl")
    text = str(caught.value)
    assert "12 of 52 images cannot be used" in text
    assert "All are listed in /ledger.jsonl" in text
    assert text.count("not_an_image") == 10
    assert "a.tar/z09.png" in text
    document = data_set.document(max_bad_fraction=0.25)
    assert data_set.runs == 0
    check_document(document, data_set.data, "/ledger.jsonl")


def test_an_empty_split_says_what_was_left_out(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    data_set.add("a.tar", labelled(make_png, range(8)))
    document = data_set.document(include_labels=("3",))
    with pytest.raises(DataError, match=r"split has no images .*left out: 7 by label"):
        check_document(document, data_set.data, "/ledger.jsonl")


def test_new_shards_move_no_image_to_another_split(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    def splits() -> dict[int, str]:
        document = data_set.document()
        return {label: split for split in SPLITS for label in data_set.items(document, split)[1]}

    data_set.add("b.tar", labelled(make_png, range(20)))
    before = splits()
    data_set.add("a.tar", labelled(make_png, range(20, 60)))
    after = splits()
    assert data_set.runs == 1
    assert before == {label: after[label] for label in before}


def pack(kind: str, pictures: list[bytes], make_tar: Callable[..., Path], path: Path) -> bytes:
    """A good shard of a format."""
    named = [(f"{k:03d}.png", picture) for k, picture in enumerate(pictures)]
    buffer = io.BytesIO()
    match kind:
        case "tar":
            return make_tar(path, named).read_bytes()
        case "zip":
            with zipfile.ZipFile(buffer, "w") as archive:
                for name, picture in named:
                    archive.writestr(name, picture)
        case "parquet":
            pq.write_table(pa.table({"image": pictures}), buffer)
    return buffer.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-200],
    "header": lambda content: b"x" * 512 + content[512:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize(
    ("kind", "damage", "reason"),
    [
        ("zip", "cut", "unreadable_shard"),
        ("zip", "empty", "empty"),
        ("parquet", "cut", "unreadable_shard"),
        ("parquet", "empty", "empty"),
        ("tar", "header", "unreadable_shard"),
        ("tar", "empty", "empty"),
    ],
)
def test_a_shard_that_cannot_be_read_counts_as_the_images_it_hides(
    data_set: DataSet, make_png: Callable[..., bytes], kind: str, damage: str, reason: str
) -> None:
    directory = data_set.directory / "in"
    for k in range(10):
        pictures = [make_png(40 * k + i) for i in range(40)]
        content = pack(kind, pictures, data_set.make_tar, data_set.directory / "one.tar")
        content = DAMAGE[damage](content) if k == 5 else content
        (directory / f"{k}.{kind}").write_bytes(content)
    document = data_set.document()
    assert sum(document["counts"].values()) == 360
    (refused,) = document["refused"]["items"]
    assert (refused["source"], refused["reason"]) == (f"5.{kind}", reason)
    assert refused["count"] == pytest.approx(40, rel=0.1)
    assert refused["detail"].endswith(f"(about {refused['count']} images)")
    assert document["refused"]["by_reason"] == {reason: refused["count"]}
    with pytest.raises(DataError, match=f"{refused['count']} of .* images cannot be used"):
        check_document(document, data_set.data, "/ledger.jsonl")


def test_what_is_hidden_is_judged_by_other_formats_where_there_is_no_other_of_its_own(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    pictures = [make_png(k, (64, 64)) for k in range(40)]
    source = data_set.directory / "in"
    whole = pack("zip", pictures, data_set.make_tar, source)
    (source / "a.zip").write_bytes(whole[:-200])
    alone = data_set.document()
    (refused,) = alone["refused"]["items"]
    assert refused["count"] == 1
    assert refused["detail"].endswith("(how many images is not known)")
    pack("tar", pictures, data_set.make_tar, source / "b.tar")
    (refused,) = data_set.document()["refused"]["items"]
    assert 25 < refused["count"] < 45


def test_a_loose_file_of_many_sequences_counts_as_those_it_hides(tmp_path: Path) -> None:
    def npy(*shape: int) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.random.default_rng(0).normal(size=shape).astype(np.float32))
        return buffer.getvalue()

    (tmp_path / "in").mkdir()
    for k in range(20):
        (tmp_path / "in" / f"{k}.npy").write_bytes(npy(10, 2, 64 if k else 65))
    data = DataConfig(sources=(str(tmp_path / "in"),), sequence_shape=(2, 64))
    storage = LocalStorage(str(tmp_path / "root"))
    inputs = list_inputs(data, storage)
    units = [preprocess_shard(shard, data, storage) for shard in inputs.shards]
    (refused,) = make_document(data, storage, inputs.shards, units, ())["refused"]["items"]
    assert (refused["source"], refused["reason"], refused["count"]) == ("0.npy", "wrong_shape", 10)


def test_a_split_may_be_empty_that_is_to_have_nothing(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    data_set.add("a.tar", labelled(make_png, range(20)))
    document = data_set.document(validation_fraction=0.0)
    assert document["counts"]["validation"] == 0
    check_document(document, data_set.data, "/ledger.jsonl")
    document = data_set.document(validation_fraction=1e-9)
    with pytest.raises(DataError, match="The validation split has no images"):
        check_document(document, data_set.data, "/ledger.jsonl")


@pytest.mark.parametrize("content", [b"", b'{"splits": {', b"\xff\xfe"])
def test_a_damaged_manifest_of_a_unit_is_named(
    data_set: DataSet, make_png: Callable[..., bytes], content: bytes
) -> None:
    data_set.add("a.tar", labelled(make_png, range(20)))
    data_set.document()
    (shard,) = list_inputs(data_set.data, data_set.storage).shards
    path = f"{unit_directory(shard, data_set.data)}/manifest.json"
    data_set.storage.replace(path, content)
    with pytest.raises(StorageError, match=r"is missing or not what .* delete the directory"):
        read_units(data_set.storage, [shard], data_set.data)


def test_twins_without_a_label_count_once(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    for name in ("a", "b"):
        data_set.add(f"{name}.tar", [(f"{name}{k}.png", make_png(k)) for k in range(20)])
    document = data_set.document(drop_duplicates=True)
    assert sum(document["counts"].values()) == 20
    assert document["unlabelled"] == document["counts"]


def test_where_nothing_may_be_bad_what_has_nothing_bad_is_used(
    data_set: DataSet, make_png: Callable[..., bytes]
) -> None:
    data_set.add("a.tar", labelled(make_png, range(20)))
    document = data_set.document(max_bad_fraction=0.0)
    check_document(document, data_set.data, "/ledger.jsonl")
