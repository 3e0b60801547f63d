"""Remote shards on local disk: right by their hash, within the limit, shared by processes."""

import contextlib
import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import shard_cache
from pipeline.errors import ConfigError, StorageError
from pipeline.shard_cache import (
    CacheFullError,
    PassingError,
    RemoteFile,
    ShardCache,
    cache_directory,
)
from pipeline.shards import write_arrow
from pipeline.storage import LocalStorage, join_content, open_storage

SECONDS = 30  # after which a test that waits has failed
ITEMS = 8


class CountedStorage:
    """A root that remembers what is read from it and can be told to fail."""

    def __init__(self, directory: Path) -> None:
        self._storage = LocalStorage(str(directory))
        self.uri = self._storage.uri
        self.reads: list[str] = []
        self.before_read: Callable[[str], None] = lambda path: None

    def read(self, path: str) -> bytes:
        self.reads.append(path)
        self.before_read(path)
        return self._storage.read(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


@pytest.fixture
def storage(tmp_path: Path) -> CountedStorage:
    return CountedStorage(tmp_path / "root")


def put(storage: Any, number: int) -> RemoteFile:
    """A shard in the root; all are equally large."""
    pixels = np.full((ITEMS, 1, 4, 4), number, np.uint8)
    content = join_content(write_arrow(pixels, [number] * ITEMS, ["x"] * ITEMS))
    storage.replace(f"d/{number}.arrow", content)
    sha256 = hashlib.sha256(content).hexdigest()
    return RemoteFile(f"d/{number}.arrow", sha256, len(content))


def open_cache(storage: Any, tmp_path: Path, room_for: float, **options: Any) -> ShardCache:
    size = put(storage, 0).num_bytes
    return ShardCache(storage, int(room_for * size), tmp_path / "cache", **options)


def number_in(table: Any) -> int:
    return table.column("label")[0].as_py()


def test_a_shard_is_fetched_once_and_then_found(storage: CountedStorage, tmp_path: Path) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)
    assert not cache.holds(file)
    assert [number_in(cache.open_table(file)) for _ in range(3)] == [7, 7, 7]
    again = open_cache(storage, tmp_path, 4)
    assert again.holds(file)
    assert number_in(again.open_table(file)) == 7
    assert storage.reads == ["d/7.arrow"]
    assert cache.num_bytes() == file.num_bytes


def test_the_least_recently_used_one_goes(storage: CountedStorage, tmp_path: Path) -> None:
    cache = open_cache(storage, tmp_path, 3.5)
    files = [put(storage, k) for k in range(6)]
    for k in (0, 1, 2, 0, 3):
        os.utime(cache.path_of(files[k]), ns=(0, 0)) if cache.holds(files[k]) else None
        cache.fetch(files[k])
    assert [cache.holds(file) for file in files] == [True, False, True, True, False, False]
    cache.touch([files[2]])
    cache.fetch(files[4])
    assert [cache.holds(file) for file in files] == [False, False, True, True, True, False]


def test_what_is_kept_stays(storage: CountedStorage, tmp_path: Path) -> None:
    cache = open_cache(storage, tmp_path, 2.5)
    files = [put(storage, k) for k in range(4)]
    for file in files[:2]:
        cache.fetch(file)
    cache.fetch(files[2], keep=lambda: [files[0]])
    assert [cache.holds(file) for file in files] == [True, False, True, False]
    with pytest.raises(CacheFullError):
        cache.fetch(files[3], keep=lambda: files)
    assert [cache.holds(file) for file in files] == [True, False, True, False]


def test_a_shard_larger_than_the_limit_has_no_room(storage: CountedStorage, tmp_path: Path) -> None:
    cache, file = open_cache(storage, tmp_path, 0.5), put(storage, 1)
    with pytest.raises(CacheFullError):
        cache.fetch(file)
    assert storage.reads == []
    assert cache.num_bytes() == 0


def test_a_deleted_shard_stays_readable_where_it_is_mapped(
    storage: CountedStorage, tmp_path: Path
) -> None:
    cache = open_cache(storage, tmp_path, 1)
    first = cache.open_table(put(storage, 1))
    second = cache.open_table(put(storage, 2))
    assert cache.num_bytes() == put(storage, 2).num_bytes
    assert (number_in(first), number_in(second)) == (1, 2)


def test_a_damaged_file_is_noticed_by_the_next_process_and_fetched_again(
    storage: CountedStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)
    path = cache.fetch(file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    other = open_cache(storage, tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        assert number_in(other.open_table(file)) == 7
    assert f"The cached shard {path} is damaged and is fetched again." in caplog.text
    assert storage.reads == ["d/7.arrow"] * 2
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    path.write_bytes(b"")  # cut to nothing, as by a power cut after the rename
    assert number_in(open_cache(storage, tmp_path, 4).open_table(file)) == 7


def test_damage_in_the_root_is_an_error_and_is_not_cached(
    storage: CountedStorage, tmp_path: Path
) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)
    storage.replace(file.path, b"something else")
    with pytest.raises(StorageError, match=r"d/7\.arrow is missing or not what its manifest says"):
        cache.fetch(file)
    storage.delete(file.path)
    with pytest.raises(StorageError, match=r"d/7\.arrow is missing or not what its manifest says"):
        cache.fetch(file)
    assert len(storage.reads) == 2
    assert cache.num_bytes() == 0


def test_a_storage_that_is_away_for_a_minute_is_waited_for(
    storage: CountedStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    clock = {"pause": waited.append, "clock": lambda: sum(waited)}
    cache = open_cache(storage, tmp_path, 4, **clock)
    file = put(storage, 7)

    def be_away(path: str) -> None:
        if sum(waited) < 60:
            raise StorageError("Cannot read it: no route to host.")

    storage.before_read = be_away
    with caplog.at_level(logging.WARNING):
        assert number_in(cache.open_table(file)) == 7
    assert waited == [1, 2, 4, 8, 15, 15, 15]
    assert (
        "d/7.arrow is not read yet, next try in 15 s: Cannot read it: no route to host."
        in caplog.text
    )


def test_patience_has_an_end(storage: CountedStorage, tmp_path: Path) -> None:
    waited: list[float] = []
    clock = {"pause": waited.append, "clock": lambda: sum(waited)}
    cache = open_cache(storage, tmp_path, 4, patience_s=20, **clock)
    file = put(storage, 7)

    def fail(path: str) -> None:
        raise StorageError("Cannot read it: no route to host.")

    storage.before_read = fail
    with pytest.raises(StorageError, match="no route to host"):
        cache.fetch(file)
    assert waited == [1, 2, 4, 8, 5]
    assert len(storage.reads) == 6
    waited.clear()
    with pytest.raises(PassingError, match="no route to host"):
        cache.fetch(file, tries_again=False)
    assert waited == []
    cache.close()
    with pytest.raises(StorageError, match="no route to host"):
        cache.fetch(file)
    assert waited == []
    assert cache.num_bytes() == 0


def test_a_forbidden_shard_is_not_asked_for_again(storage: CountedStorage, tmp_path: Path) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)

    def forbid(path: str) -> None:
        raise StorageError("Cannot read it: Forbidden.") from PermissionError("Forbidden")

    storage.before_read = forbid
    with pytest.raises(StorageError, match="Forbidden"):
        cache.fetch(file)
    assert len(storage.reads) == 1


def test_a_fault_of_the_object_store_passes(object_store: Any, tmp_path: Path) -> None:
    store, bucket = object_store
    storage = open_storage(f"s3://{bucket}/root")
    file = put(storage, 7)
    waited: list[float] = []
    cache = open_cache(storage, tmp_path, 4, pause=waited.append)
    store.fails = lambda method, path: method == "GET" and len(waited) < 2
    assert number_in(cache.open_table(file)) == 7
    assert waited == [1, 2]
    assert cache.num_bytes() == file.num_bytes


def test_many_threads_fetch_a_shard_once(storage: CountedStorage, tmp_path: Path) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)
    together = threading.Barrier(6)
    found: list[int] = []

    def fetch() -> None:
        together.wait(SECONDS)
        found.append(number_in(cache.open_table(file)))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 6
    assert storage.reads == ["d/7.arrow"]


def test_the_room_of_a_fetch_under_way_is_taken(storage: CountedStorage, tmp_path: Path) -> None:
    waited = threading.Event()
    cache = open_cache(storage, tmp_path, 1.5, pause=lambda seconds: waited.set())
    slow, other = put(storage, 1), put(storage, 2)
    begun = threading.Event()

    def hold(path: str) -> None:
        if path == slow.path:
            begun.set()
            assert waited.wait(SECONDS)  # until the other one found no room

    storage.before_read = hold
    thread = threading.Thread(target=cache.fetch, args=(slow,))
    thread.start()
    assert begun.wait(SECONDS)
    assert cache.num_bytes() == slow.num_bytes
    assert number_in(cache.open_table(other)) == 2
    thread.join()
    assert storage.reads == [slow.path, other.path]
    assert [cache.holds(slow), cache.holds(other)] == [False, True]


def test_what_a_killed_process_left_is_cleared_away(
    storage: CountedStorage, tmp_path: Path
) -> None:
    cache, file = open_cache(storage, tmp_path, 1), put(storage, 7)
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from pipeline.shard_cache import RemoteFile, ShardCache; "
        "from pipeline.storage import LocalStorage\n"
        "class Killed(LocalStorage):\n"
        "    def read(self, path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache = ShardCache(Killed(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))\n"
        "cache.fetch(RemoteFile('d/9.arrow', '9' * 64, int(sys.argv[2])))"
    )
    arguments = [storage.uri, str(cache.max_bytes), str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, timeout=SECONDS)
    assert done.returncode == -9
    (left,) = cache.directory.glob("*.part")
    assert left.stat().st_size == file.num_bytes
    assert number_in(cache.open_table(file)) == 7
    assert not left.exists()


def test_another_file_in_the_place_of_the_staged_one_is_not_written_to(
    storage: CountedStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)
    part = cache.path_of(file).with_suffix(".part")
    lock, times = fcntl.flock, []

    def lose_the_race(descriptor: int, operation: int) -> None:
        if part.exists() and not times:
            times.append(1)
            part.unlink()  # as one does who clears up between our opening and locking it
        lock(descriptor, operation)

    monkeypatch.setattr(shard_cache.fcntl, "flock", lose_the_race)
    assert number_in(cache.open_table(file)) == 7
    assert times == [1]
    assert storage.reads == ["d/7.arrow"]


def test_a_full_disk_is_said_with_what_to_do(
    storage: CountedStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = open_cache(storage, tmp_path, 4), put(storage, 7)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_cache.os, "ftruncate", full)
    with pytest.raises(
        StorageError, match=r"cannot be used: No space left.*lower data\.cache_bytes"
    ):
        cache.fetch(file)
    assert list(cache.directory.glob("*.part")) == []


def test_the_directory_is_that_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIFFUSION_CACHE", "/somewhere")
    assert cache_directory() == Path("/somewhere")
    monkeypatch.setenv("RAYDIFFUSION_CACHE", "")
    monkeypatch.setenv("HOME", "/home/x")
    assert cache_directory() == Path("/home/x/.cache/raydiffusion")
    monkeypatch.setenv("RAYDIFFUSION_CACHE", "cache")
    with pytest.raises(ConfigError, match="must be an absolute path, got cache"):
        cache_directory()


READER = """
import sys
import numpy as np
from pathlib import Path
from pipeline.cached_items import CachedItems, RemoteShard
from pipeline.shard_cache import RemoteFile, ShardCache
from pipeline.shards import front_to_back
from pipeline.storage import LocalStorage

root, directory, max_bytes, count, *files = sys.argv[1:]
shards = [RemoteShard(RemoteFile(path, sha256, int(size)), int(count)) for path, sha256, size in
          (file.split(",") for file in files)]
cache = ShardCache(LocalStorage(root), int(max_bytes), Path(directory))
items = CachedItems(shards, (1, 4, 4), "uint8", cache, None)
want = np.array([int(Path(file.split(',')[0]).stem) for file in files])
for epoch in range(3):
    items.prefetch(front_to_back(items.counts))
    for ids in np.split(np.arange(len(items)), len(items) // 12):
        assert np.array_equal(items.gather(ids)[:, 0, 0, 0], want[ids // int(count)])
        assert np.array_equal(items.labels_of(ids), want[ids // int(count)])
items.close()
print("read", len(items))
"""


def test_two_processes_share_a_cache_that_holds_a_quarter(
    storage: CountedStorage, tmp_path: Path
) -> None:
    files = [put(storage, k) for k in range(24)]
    cache = open_cache(storage, tmp_path, 6)
    shards = [f"{f.path},{f.sha256},{f.num_bytes}" for f in files]
    # The second begins in the middle: they need other shards at the same time.
    orders = [shards, shards[12:] + shards[:12]]
    arguments = [storage.uri, str(tmp_path / "cache"), str(cache.max_bytes), str(ITEMS)]
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *arguments, *order],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for order in orders
    ]
    largest = 0
    while any(reader.poll() is None for reader in readers):
        largest = max(largest, cache.num_bytes())
        with contextlib.suppress(subprocess.TimeoutExpired):
            readers[0].wait(0.01)  # who asks all the time lets no one else have the lock
    assert [reader.communicate(timeout=SECONDS)[0] for reader in readers] == ["read 192\n"] * 2
    assert 0 < largest <= cache.max_bytes
    for file in files:
        if cache.holds(file):
            assert hashlib.sha256(cache.path_of(file).read_bytes()).hexdigest() == file.sha256
