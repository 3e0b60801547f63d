import errno
import functools
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import identities
from pipeline.errors import DataError, StorageError
from pipeline.identities import InputFile, open_once, open_seekable
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage


@pytest.fixture
def hashed() -> Iterator[list[str]]:
    """Collects the names of the files that are read to be hashed."""
    names: list[str] = []
    real = identities._hash

    def count(uri: str) -> str:
        names.append(Path(uri).name)
        return real(uri)

    with patch.object(identities, "_hash", count):
        yield names


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """An object store in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def inputs_of(tmp_path: Path, source: str, **options: Any) -> dict[str, str | None]:
    data = DataConfig(sources=(source,), resolution=8)
    found = list_inputs(data, LocalStorage(str(tmp_path / "root")), **options)
    return {shard.name: shard.sha256 for shard in found.shards}


def test_hashes_only_what_changed(tmp_path: Path, hashed: list[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_text(name)
    first = inputs_of(tmp_path, f"{tmp_path}/*.tar")
    assert sorted(hashed) == ["a.tar", "b.tar"]
    assert inputs_of(tmp_path, f"{tmp_path}/*.tar") == first
    assert len(hashed) == 2
    # The same name, size and modification time, other content.
    stat = (tmp_path / "a.tar").stat()
    (tmp_path / "a.tar").write_text("z")
    os.utime(tmp_path / "a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = inputs_of(tmp_path, f"{tmp_path}/*.tar")
    assert hashed[2:] == ["a.tar"]
    assert again["a.tar"] != first["a.tar"]
    assert again["b.tar"] == first["b.tar"]


def test_a_change_within_one_tick_of_the_clock_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for text in ("one", "two", "six"):
        path.write_text(text)  # in place: the same inode and size
        found = inputs_of(tmp_path, str(path))
        assert found["a.tar"] == hashlib.sha256(text.encode()).hexdigest()


def test_unknown_remote_files_are_read_only_when_allowed(
    tmp_path: Path, memory: MemoryFileSystem, hashed: list[str]
) -> None:
    memory.pipe("/bucket/a.tar", b"a")
    memory.pipe("/bucket/b.tar", b"b")
    unread = inputs_of(tmp_path, "memory://bucket/*.tar", read_remote=False)
    assert unread == {"a.tar": None, "b.tar": None}
    assert hashed == []
    known = inputs_of(tmp_path, "memory://bucket/*.tar")
    assert sorted(hashed) == ["a.tar", "b.tar"]
    memory.pipe("/bucket/c.tar", b"c")
    later = inputs_of(tmp_path, "memory://bucket/*.tar", read_remote=False)
    assert later == {**known, "c.tar": None}
    assert len(hashed) == 2


def test_a_store_that_tells_no_identity_is_read_every_time(
    tmp_path: Path, memory: MemoryFileSystem, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "_STAMPS", ((), ()))
    memory.pipe("/bucket/a.tar", b"a")
    inputs_of(tmp_path, "memory://bucket/a.tar")
    inputs_of(tmp_path, "memory://bucket/a.tar")
    assert hashed == ["a.tar", "a.tar"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "1.png").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="There are no images at"):
        inputs_of(tmp_path, str(tmp_path / "a.tar"))
    with pytest.raises(DataError, match=r"Cannot read s3x://b/a.tar: .*Check that it exists"):
        inputs_of(tmp_path, "s3x://b/a.tar")


@pytest.mark.parametrize(
    "pattern", ["memory://bucket/a.tar", "memory://bucket", "memory://bucket/?.tar"]
)
def test_a_reworded_pattern_reads_nothing_again(
    tmp_path: Path, memory: MemoryFileSystem, hashed: list[str], pattern: str
) -> None:
    for name in ("a", "b"):
        memory.pipe(f"/bucket/{name}.tar", name.encode())
    known = inputs_of(tmp_path, "memory://bucket/*.tar")
    again = inputs_of(tmp_path, pattern, read_remote=False)
    assert again == {name: known[name] for name in again}
    assert len(hashed) == 2


def test_hashes_are_remembered_as_they_are_made(tmp_path: Path) -> None:
    for k in range(6):
        (tmp_path / f"{k}.tar").write_text("x")
    code = """
import glob, os, signal, sys
from pipeline import identities
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage

identities.SAVE_BYTES, identities.HASH_THREADS = 3, 1
hash_one, num_hashed = identities._hash, []

def hash_or_die(uri):
    if len(num_hashed) == 5:
        while not glob.glob(f"{sys.argv[1]}/root/cache/identities/*.json"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    num_hashed.append(uri)
    return hash_one(uri)

identities._hash = hash_or_die
data = DataConfig(sources=(f"{sys.argv[1]}/*.tar",), resolution=8)
list_inputs(data, LocalStorage(f"{sys.argv[1]}/root"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    with patch.object(identities, "_hash", lambda uri: "new"):
        found = list(inputs_of(tmp_path, f"{tmp_path}/*.tar").values())
    assert 1 <= len([sha256 for sha256 in found if sha256 != "new"]) <= 5


def test_hashes_made_before_an_error_are_remembered(
    tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "HASH_THREADS", 1)
    for name in ("a", "b", "c"):
        memory.pipe(f"/bucket/{name}.tar", name.encode())
    hash_one = identities._hash

    def hash_but_b(uri: str) -> str:
        if "b.tar" in uri:
            raise DataError("Cannot read b.")
        return hash_one(uri)

    with monkeypatch.context() as patched:
        patched.setattr(identities, "_hash", hash_but_b)
        with pytest.raises(DataError, match="Cannot read b"):
            inputs_of(tmp_path, "memory://bucket/*.tar")
    found = inputs_of(tmp_path, "memory://bucket/*.tar", read_remote=False)
    assert found["a.tar"] == hashlib.sha256(b"a").hexdigest()
    assert found["b.tar"] is None


@pytest.mark.parametrize("open_it", [open_once, open_seekable])
@pytest.mark.parametrize("is_remote", [False, True])
def test_content_is_checked_by_its_hash_where_the_identity_is_another(
    tmp_path: Path, memory: MemoryFileSystem, open_it: Callable[..., Any], is_remote: bool
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 5000)
    memory.pipe("/a.tar", b"x" * 5000)
    uri = "memory://a.tar" if is_remote else str(path)
    file = InputFile("a.tar", uri, 5000, (5000, 1, 2, 3), identities._hash(uri))
    with open_it(file) as opened:
        assert opened.read(3) == b"xxx"  # the rest need not be read
    with (
        pytest.raises(DataError, match=r"a\.tar changed since the run was planned"),
        open_it(replace(file, sha256="0" * 64)) as opened,
    ):
        opened.read()


def test_what_the_disk_says_while_a_file_is_sought_in_is_an_error_of_the_data(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"x" * 5000)
    file = InputFile("a.zip", str(path), 5000, None, identities._hash(str(path)))
    with open_seekable(file) as opened:
        raw = opened._file  # pyright: ignore
        with patch.object(opened, "_file", Faulty(raw)):
            for call in (opened.read, lambda: opened.seek(0)):
                with pytest.raises(DataError, match=r"Cannot read .*a\.zip: Input/output error"):
                    call()


def test_a_copy_that_finds_no_room_is_an_error_of_the_storage(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/a.zip", b"x" * 5000)
    file = InputFile("a.zip", "memory://a.zip", 5000, None, identities._hash("memory://a.zip"))
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "w+b"))
    with (
        pytest.raises(StorageError, match=r"copy of memory://a\.zip in .*: No space left.*TMPDIR"),
        open_seekable(file),
    ):
        pass


class Faulty:
    """A file whose disk fails."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def seek(self, offset: int, whence: int = 0) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("open_it", [open_once, open_seekable])
def test_a_change_while_a_file_is_read_is_noticed(
    tmp_path: Path, hashed: list[str], open_it: Callable[..., Any]
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 5000)
    data = DataConfig(sources=(str(path),), resolution=8)
    (shard,) = list_inputs(data, LocalStorage(str(tmp_path / "root"))).shards
    (file,) = shard.files
    assert hashed == ["a.tar"]
    with open_it(file) as opened:
        assert len(opened.read()) == 5000
    assert hashed == ["a.tar"]  # the identity says that it is the same
    with open_it(file):
        os.utime(path)
    assert hashed == ["a.tar", "a.tar"]  # touched, and the same
    with pytest.raises(DataError, match="changed since the run was planned"), open_it(file):
        path.write_bytes(b"y" * 5000)
