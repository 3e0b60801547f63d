import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import object_storage
from pipeline.errors import ConfigError, StorageError
from pipeline.leases import hold_lease
from pipeline.processes import process_tag
from pipeline.registry import Registry
from pipeline.storage import LocalStorage, Storage, check_writable, claim, open_storage


@pytest.fixture(params=["local", "s3"])
def make_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Storage]:
    """Opens the same root again and again: on disk, and on an S3 server."""
    if request.param == "local":
        return lambda: open_storage(str(tmp_path / "root"))
    _, bucket = request.getfixturevalue("object_store")
    return lambda: open_storage(f"s3://{bucket}/root")


def test_create_is_exclusive_and_replace_is_not(make_storage: Callable[[], Storage]) -> None:
    storage = make_storage()
    assert storage.create("a/b.json", b"1")
    assert not storage.create("a/b.json", b"2")
    assert make_storage().read("a/b.json") == b"1"
    storage.replace("a/b.json", b"3")
    assert storage.read("a/b.json") == b"3"


def test_one_of_many_creators_wins(make_storage: Callable[[], Storage]) -> None:
    storage = make_storage()
    storage.replace("warm", b"")
    won: list[int] = []

    def contend(k: int) -> None:
        if storage.create("one", str(k).encode()):
            won.append(k)

    threads = [threading.Thread(target=contend, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("one") == str(won[0]).encode()


def test_a_large_file_leaves_memory_once_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        done.append("synced")

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        done.append(f"dropped {os.fstat(descriptor).st_size}")
        raise OSError("a file system that takes no advice")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    storage = open_storage(str(tmp_path))
    assert storage.create("large", [memoryview(bytes(1 << 19))] * 2)
    storage.replace("small", bytes((1 << 20) - 1))
    assert done == ["synced", f"dropped {1 << 20}", "synced"]
    assert storage.read("large") == bytes(1 << 20)


def first(count: int, method: str, part: str) -> Callable[[str, str], bool]:
    """Holds of the first requests of a kind."""
    seen: list[str] = []

    def is_one(its_method: str, path: str) -> bool:
        if its_method == method and part in path:
            seen.append(path)
        return its_method == method and part in path and len(seen) <= count

    return is_one


@pytest.mark.parametrize("times", [1, 3])
def test_a_creation_that_meets_another_tries_again(object_store: Any, times: int) -> None:
    store, bucket = object_store
    storage = open_storage(f"s3://{bucket}/root")
    store.conflicts = first(times, "PUT", "/x")
    assert storage.create("x", b"1")
    store.conflicts = first(times, "PUT", "/x")
    assert not storage.create("x", b"2")
    assert storage.read("x") == b"1"


def test_a_conflict_without_end_is_a_sentence(
    object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bucket = object_store
    monkeypatch.setattr(object_storage, "CONFLICT_DELAYS_S", (0.0, 0.0))
    store.conflicts = lambda method, path: method == "PUT"
    with pytest.raises(StorageError, match=r"Cannot write .*/x: .*ConditionalRequestConflict"):
        open_storage(f"s3://{bucket}/root").create("x", b"1")


def test_who_wrote_what_is_there_came_first_though_the_answer_was_lost(object_store: Any) -> None:
    store, bucket = object_store
    storage = open_storage(f"s3://{bucket}/root")
    store.loses = first(1, "PUT", "/x")
    assert claim(storage, "x", b"mine")
    assert not claim(storage, "x", b"another's")
    registry = Registry(storage, "m")
    store.loses = first(1, "PUT", "/versions/")
    assert registry.add_version({"key": "a"})["number"] == 1
    store.loses = first(1, "PUT", "/promotions/")
    assert registry.promote(1, "the first")["number"] == 1
    store.loses = first(1, "PUT", "/lease-")
    with hold_lease(storage, "d", wait=False):
        assert storage.list("d") == ["lease-000001.json"]
    store.loses = first(1, "PUT", "/probes/")
    check_writable(storage)


def test_lists_and_deletes(make_storage: Callable[[], Storage]) -> None:
    storage = make_storage()
    assert storage.list("d") == []
    for name in ("d/2", "d/1", "d/sub/3"):
        storage.replace(name, b"x")
    assert storage.list("d") == ["1", "2", "sub"]
    assert storage.exists("d/sub/3")
    storage.delete("d")
    storage.delete("d")
    assert not storage.exists("d/1")
    with pytest.raises(FileNotFoundError):
        storage.read("d/1")


def test_hidden_files_are_not_listed_and_below_a_file_is_nothing(
    make_storage: Callable[[], Storage],
) -> None:
    storage = make_storage()
    for name in ("d/1", "d/.DS_Store", "d/._1"):
        storage.replace(name, b"x")
    assert storage.list("d") == ["1"]
    assert storage.list("d/1") == []
    assert not storage.exists("d/1/x")
    with pytest.raises(FileNotFoundError):
        storage.read("d/1/x")


@pytest.mark.parametrize("root", ["~nosuchuser/runs", "s3://", "://", "://runs", "a\0b"])
def test_a_root_that_can_be_none_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)storage root .*\. Write "):
        open_storage(root)


def test_a_local_path_is_the_file_itself(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.replace("x.arrow", b"content")
    assert storage.local_path("x.arrow").read_bytes() == b"content"
    with pytest.raises(StorageError, match=r"y\.arrow is missing"):
        storage.local_path("y.arrow")


def test_check_writable_leaves_nothing(make_storage: Callable[[], Storage]) -> None:
    storage = make_storage()
    check_writable(storage)
    assert storage.list("probes") == []


def test_opens_again_in_another_process(make_storage: Callable[[], Storage]) -> None:
    storage = make_storage()
    storage.replace("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("x") == b"1"
    assert open_storage(storage.uri).read("x") == b"1"


def test_a_root_below_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in ("file", "file/root"):
        with pytest.raises(StorageError, match=r"Cannot write .*: Not a directory\. Check the"):
            check_writable(open_storage(str(tmp_path / root)))


def test_a_file_where_a_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("")
    with pytest.raises(
        StorageError, match=r"Cannot write .*: a file is where the directory should be"
    ):
        open_storage(str(tmp_path)).create("steps/x", b"")


def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StorageError, match=r"No space left on device\. Check the path"):
        storage.create("a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_goes_in_the_middle_of_a_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    mkdir = Path.mkdir

    def go_after(self: Path, **how: Any) -> None:
        mkdir(self, **how)
        root.rename(tmp_path / "away")

    monkeypatch.setattr(Path, "mkdir", go_after)
    for write in ("create", "replace"):
        with pytest.raises(StorageError, match=r"Cannot write .*: its directory is gone\. Check"):
            getattr(open_storage(str(root)), write)("d/x", b"")
        (tmp_path / "away").rename(root)


KILLED = """
import os, signal, sys
from pipeline.storage import open_storage
link = os.link
def kill(source, target):
    if sys.argv[2] == "after":
        link(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.link = kill
open_storage(sys.argv[1]).create("d/x", b"1")
"""


def staged_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".staged-")]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_a_killed_writer_leaves_goes_with_the_next_write(tmp_path: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], timeout=60)
    assert done.returncode == -signal.SIGKILL
    storage = open_storage(str(tmp_path))
    assert len(staged_in(tmp_path / "d")) == 1
    assert storage.list("d") == (["x"] if moment == "after" else [])
    assert storage.create("d/x", b"2") == (moment == "before")
    assert staged_in(tmp_path / "d") == []
    assert storage.read("d/x") == (b"1" if moment == "after" else b"2")


def test_what_another_process_wrote_since_a_listing_is_deleted(object_store: Any) -> None:
    _, bucket = object_store
    storage = open_storage(f"s3://{bucket}/root")
    storage.replace("d/ours", b"1")
    assert storage.list("d") == ["ours"]  # remembered by the file system
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{bucket}/root/d/theirs", b"1")
    storage.delete("d/theirs")
    assert storage.list("d") == ["ours"]


def test_clean_removes_what_the_dead_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "after"], timeout=60)
    assert done.returncode == -signal.SIGKILL
    elsewhere, old = ".staged-0123456789ab-1-2-f", ".staged-0123456789ab-1-3-f"
    mine, nameless = f".staged-{process_tag()}-f", ".staged-f"
    for name in (elsewhere, old, mine, nameless):
        (tmp_path / "d" / name).write_bytes(b"")
    for name in (old, mine, nameless):
        os.utime(tmp_path / "d" / name, (0, 0))
    storage = open_storage(str(tmp_path))
    storage.clean("d")
    storage.clean("nowhere")
    assert sorted(staged_in(tmp_path / "d")) == sorted([elsewhere, mine])
    assert storage.read("d/x") == b"1"


def test_clean_leaves_an_object_store_as_it_is(make_storage: Callable[[], Storage]) -> None:
    storage = make_storage()
    storage.replace("d/x", b"1")
    storage.clean("d")
    assert storage.list("d") == ["x"]


def test_a_file_system_that_fails_is_not_one_without_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of SSH, whose `exists` is fsspec's own."""

    def fail(*_: object, **__: object) -> object:
        raise OSError("Socket is closed")

    storage = open_storage("memory://fails")
    assert not storage.exists("a")
    storage.create("a", b"1")
    assert storage.exists("a")
    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    with pytest.raises(StorageError, match="Cannot look for memory://fails/a: Socket is closed"):
        storage.exists("a")


@pytest.mark.parametrize(
    ("root", "remedy"),
    [
        ("s3://b/r", "Install raydiffusion[s3] on every node."),
        ("gs://b/r", "Install raydiffusion[gcs] on every node."),
        ("az://b/r", "(Install such to access). Install it on every node."),
    ],
)
def test_what_a_store_needs_is_said(
    monkeypatch: pytest.MonkeyPatch, root: str, remedy: str
) -> None:
    def lack(*_: object) -> object:
        raise ImportError("Install such to access")

    monkeypatch.setattr("fsspec.core.url_to_fs", lack)
    with pytest.raises(StorageError, match="needs a library that is not installed") as caught:
        open_storage(root).exists("a")
    assert str(caught.value).endswith(remedy)
