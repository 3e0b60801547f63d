import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import sources
from pipeline.config import load_config
from pipeline.errors import DataError
from pipeline.sources import list_input_shards
from pipeline.storage import LocalStorage

MakeTar = Callable[..., Path]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


def test_finds_shards_by_name_below_the_fixed_part(
    tmp_path: Path, storage: LocalStorage, make_tar: MakeTar
) -> None:
    (tmp_path / "deep").mkdir()
    make_tar(tmp_path / "b.tar", [("1.txt", b"b")])
    make_tar(tmp_path / "deep" / "a.tar", [("1.txt", b"a")])
    found = list_input_shards([f"{tmp_path}/**/*.tar"], storage)
    assert [shard.name for shard in found] == ["b.tar", "deep/a.tar"]
    assert len({shard.sha256 for shard in found}) == 2


def test_hashes_only_what_changed(
    tmp_path: Path, storage: LocalStorage, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = sources._hash_and_check

    def count(uri: str, size: int) -> str:
        hashed.append(Path(uri).name)
        return real(uri, size)

    monkeypatch.setattr(sources, "_hash_and_check", count)
    for name in ("a", "b"):
        make_tar(tmp_path / f"{name}.tar", [("1.txt", name.encode())])
    first = list_input_shards([f"{tmp_path}/*.tar"], storage)
    assert list_input_shards([f"{tmp_path}/*.tar"], storage) == first
    assert hashed == ["a.tar", "b.tar"]
    # The same name, size and modification time, other content.
    stat = (tmp_path / "a.tar").stat()
    make_tar(tmp_path / "a.tar", [("1.txt", b"z")])
    os.utime(tmp_path / "a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = list_input_shards([f"{tmp_path}/*.tar"], storage)
    assert hashed == ["a.tar", "b.tar", "a.tar"]
    assert again[0].sha256 != first[0].sha256
    assert again[1] == first[1]


def test_no_shards_at_the_path(tmp_path: Path, storage: LocalStorage) -> None:
    for pattern in ("none.tar", "*.tar"):
        with pytest.raises(DataError, match=r"There are no shards at .*\. Check data\.sources"):
            list_input_shards([str(tmp_path / pattern)], storage)


def test_empty_and_broken_shards(tmp_path: Path, storage: LocalStorage, make_tar: MakeTar) -> None:
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "noise.tar").write_bytes(b"x" * 2000)
    make_tar(tmp_path / "hollow.tar", [])
    for name, message in (
        ("zero", r"is empty \(0 bytes\)"),
        ("noise", "is no readable tar file"),
        ("hollow", "holds no files"),
    ):
        with pytest.raises(DataError, match=message):
            list_input_shards([str(tmp_path / f"{name}.tar")], storage)


def test_a_directory_with_the_signs_of_a_glob(
    tmp_path: Path, storage: LocalStorage, make_tar: MakeTar
) -> None:
    home = tmp_path / "[a]" / "b*"
    home.mkdir(parents=True)
    make_tar(home / "1.tar", [("1.txt", b"")])
    (home / "c.toml").write_text(
        'name = "x"\n[data]\nsources = ["*.tar", "1.tar"]\nresolution = 8\n'
    )
    config = load_config(home / "c.toml")
    assert [s.name for s in list_input_shards(config.data.sources, storage)] == ["1.tar"]


def test_two_shards_of_one_name_are_refused(
    tmp_path: Path, storage: LocalStorage, make_tar: MakeTar
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        make_tar(tmp_path / name / "a.tar", [("1.txt", b"")])
    with pytest.raises(DataError, match=r"Two shards are called a\.tar"):
        list_input_shards([f"{tmp_path}/x/a.tar", f"{tmp_path}/y/a.tar"], storage)
