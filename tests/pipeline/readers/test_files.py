import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.readers.entries import Entry, Item, Refusal
from pipeline.readers.files import iter_files
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage


@pytest.fixture
def entries_of(tmp_path: Path) -> Callable[..., list[Entry]]:
    """What the loose files of sources below `tmp_path` are read as."""

    def run(*sources: str, **settings: Any) -> list[Entry]:
        paths = tuple(str(tmp_path / source) for source in sources)
        data = DataConfig(sources=paths, resolution=8, **settings)
        (bucket,) = list_inputs(data, LocalStorage(str(tmp_path / "root"))).shards
        return list(iter_files(bucket, data))

    return run


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.fsencode(path))


def test_the_directory_below_the_pattern_is_the_class(
    tmp_path: Path, entries_of: Callable[..., list[Entry]]
) -> None:
    for name in ("top.png", "cats/1.png", "deep/dogs/2.png", "7/3.png"):
        write(tmp_path / "in" / name)
    labels = {e.member: e.label for e in entries_of("in") if isinstance(e, Item)}
    assert labels == {
        "7/3.png": 7,
        "cats/1.png": "cats",
        "deep/dogs/2.png": "dogs",
        "top.png": None,
    }


def test_files_of_one_name_in_two_sources_keep_their_class_and_are_all_read(
    tmp_path: Path, entries_of: Callable[..., list[Entry]]
) -> None:
    whole = str(tmp_path / "b" / "1.png").lstrip("/")
    for name in ("a/1.png", "b/1.png", "b/2.png", "b/cats/1.png", "c/cats/1.png", f"a/{whole}"):
        write(tmp_path / name)
    entries = [entry for entry in entries_of("a", "b", "c") if isinstance(entry, Item)]
    assert len({entry.member for entry in entries}) == len(entries) == 6
    labels = {
        Path(os.fsdecode(bytes(e.content))).relative_to(tmp_path).as_posix(): e.label
        for e in entries
    }
    assert labels.pop(f"a/{whole}") == "b"  # its own directory
    assert labels == {
        "a/1.png": None, "b/1.png": None, "b/2.png": None,
        "b/cats/1.png": "cats", "c/cats/1.png": "cats",
    }  # fmt: skip


def test_a_directory_that_is_no_class_is_said_and_need_not_be_one(
    tmp_path: Path, entries_of: Callable[..., list[Entry]]
) -> None:
    write(tmp_path / "in" / "12345678901234567890123" / "1.png")
    write(tmp_path / "in" / "cats" / "2.png")
    (refused,) = [entry for entry in entries_of("in") if isinstance(entry, Refusal)]
    assert refused.reason == "label_invalid"
    assert refused.detail.startswith("its directory is no class: class numbers go from 0")
    assert refused.detail.endswith("see data.label_field")
    items = [entry for entry in entries_of("in", label_field="") if isinstance(entry, Item)]
    assert [item.label for item in items] == [None, None]


def test_a_class_that_changes_while_the_name_does_not_is_another_unit(tmp_path: Path) -> None:
    write(tmp_path / "cats" / "1.png")
    storage = LocalStorage(str(tmp_path / "root"))
    found = []
    for source in ("cats", "*"):
        data = DataConfig(sources=(str(tmp_path / source),), resolution=8)
        (bucket,) = list_inputs(data, storage).shards
        found.append((bucket.files[0].class_name, bucket.sha256))
    assert [label for label, _ in found] == ["", "cats"]
    assert found[0][1] != found[1][1]


def test_names_that_are_no_utf_8_are_read_and_shown_escaped(
    tmp_path: Path, entries_of: Callable[..., list[Entry]]
) -> None:
    write(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    write(tmp_path / "in" / os.fsdecode(b"\xe9") / "1.png")
    refused, item = entries_of("in")
    assert isinstance(item, Item)
    assert (item.member, item.label) == ("caf\\udce9.png", None)
    assert isinstance(refused, Refusal)
    assert (refused.member, refused.reason) == ("\\udce9/1.png", "label_invalid")


def test_a_link_to_nothing_is_refused(
    tmp_path: Path, entries_of: Callable[..., list[Entry]]
) -> None:
    write(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "2.png").symlink_to("gone")
    item, refused = entries_of("in")
    assert isinstance(item, Item)
    assert refused == Refusal("2.png", "not_a_file", "it is a link to nothing")
    (tmp_path / "in" / "2.png").unlink()
    (tmp_path / "in" / "2.png").symlink_to("2.png")  # to itself
    assert entries_of("in") == [item, refused]
