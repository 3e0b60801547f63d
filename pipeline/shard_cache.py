"""Arrow shards of a remote storage root on local disk, by content, up to a limit.

A shard is a file named by its SHA-256 in one directory, which all processes of a node share:

- It is written beside its place and renamed, by one process or thread at a time; the others wait.
- It is checked when it is fetched, and when a process first opens it. What fails is fetched again.
- Before one comes, the least recently used ones go, until all files are within the limit. A
  process never deletes what it says it keeps. It may delete what another one has mapped: on Linux
  and macOS such a file stays readable until it is closed, and keeps its place on the disk as long.
  `touch`, called now and then, makes this rare: what someone needs is not the oldest.

Only a lock of the directory and one for each file being fetched are held, by `flock`, so that the
kernel frees them when a process is killed.
"""

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.patience import Patience
from pipeline.shards import open_table
from pipeline.storage import Storage, damaged

DIRECTORY_VARIABLE = "RAYDIFFUSION_CACHE"
PATIENCE_S = 60.0  # with a storage that is away, where nobody says more
BUSY_DELAY_S = 0.1  # until the files that others are fetching are there
BUSY_TOLD_EVERY = 300  # such delays

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """An Arrow file below a remote root, as the data set's document names it."""

    path: str
    sha256: str
    num_bytes: int


Keep = Callable[[], Iterable[RemoteFile]]


class CacheFullError(Exception):
    """What a process keeps leaves no room for a file."""


def cache_directory() -> Path:
    """Where this node's cached shards are: below $RAYDIFFUSION_CACHE, or ~/.cache/raydiffusion.

    Raises:
        ConfigError: the variable is a relative path; workers run in other directories.
    """
    path = Path(os.environ.get(DIRECTORY_VARIABLE) or "~/.cache/raydiffusion").expanduser()
    if not path.is_absolute():
        raise ConfigError(
            f"{DIRECTORY_VARIABLE} must be an absolute path, got {path}. Workers run in other "
            "directories: give the whole path."
        )
    return path


class PassingError(Exception):
    """Who asked once should ask again: the root does not answer, or the disk takes nothing."""


class ShardCache:
    """The cached shards of one root. Threads may use it side by side.

    Args:
        storage: the root.
        max_bytes: of all files in the directory together.
        directory: `cache_directory()` when not given.
        patience_s: how long a shard that cannot be read is tried again, in seconds.
        pause: waits this many seconds.
        clock: seconds.
    """

    def __init__(
        self,
        storage: Storage,
        max_bytes: int,
        directory: Path | None = None,
        *,
        patience_s: float = PATIENCE_S,
        pause: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes = max_bytes
        self.directory = (directory or cache_directory()) / "shards"
        self._storage = storage
        self._closed = threading.Event()
        self._pause = pause or self._closed.wait
        self._patience = Patience(patience_s, self._pause, clock)
        self._checked: dict[str, int] = {}  # inode of what was found good, by hash

    def close(self) -> None:
        """Gives up waiting for a storage that does not answer."""
        self._closed.set()

    def holds(self, file: RemoteFile) -> bool:
        """Whether a file of that name is there; it may be gone, or found damaged, when opened."""
        return self.path_of(file).exists()

    def open_table(self, file: RemoteFile, keep: Keep = tuple) -> pa.Table:
        """The content of a shard, memory-mapped, fetched first if need be; see `fetch`."""
        while True:
            path = self.fetch(file, keep)
            # Another process may have deleted it since.
            with contextlib.suppress(FileNotFoundError):
                return open_table(path)

    def fetch(self, file: RemoteFile, keep: Keep = tuple, *, tries_again: bool = True) -> Path:
        """Sees to it that a shard is on local disk and is what its hash says.

        Args:
            file: the shard.
            keep: names the shards that are not deleted, at the time when room is made.
            tries_again: whether a root that does not answer is asked again, with patience; else
                what may pass is a PassingError.

        Returns:
            Where it is, unless another process deletes it.

        Raises:
            CacheFullError: what is kept leaves no room.
            StorageError: the root does not answer, the shard there is damaged, or the directory
                cannot be written.
        """
        path = self.path_of(file)
        with self._as_storage_error(StorageError if tries_again else PassingError):
            self.directory.mkdir(parents=True, exist_ok=True)
            for attempt in itertools.count(1):
                if self._is_good(path, file.sha256):
                    self.touch([file])
                    return path
                with self._staged(path) as staged:
                    if path.exists():
                        continue  # another process fetched it meanwhile
                    if not self._make_room(file, keep, staged):
                        if self._closed.is_set():
                            raise CacheFullError(file.path)
                        if attempt % BUSY_TOLD_EVERY == 0:
                            logger.warning(
                                "%s waits for room in %s: what others fetch there, or files that "
                                "are not of the cache, fill data.cache_bytes.",
                                file.path,
                                self.directory,
                            )
                        self._pause(BUSY_DELAY_S)
                        continue
                    content = self._read(file, tries_again)
                    with open(staged, "wb", closefd=False) as out:
                        out.write(content)  # not flushed to disk: whoever opens it checks it
                    with self._lock():
                        path.with_suffix(".part").replace(path)
                    self._checked[file.sha256] = os.fstat(staged).st_ino
                    return path
        raise AssertionError

    def num_bytes(self) -> int:
        """Of all files in the directory."""
        with self._as_storage_error():
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._lock():
                return sum(status.st_size for status in self._scan().values())

    def touch(self, files: Iterable[RemoteFile]) -> None:
        """Marks shards as used now, for all processes."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path_of(file))

    def path_of(self, file: RemoteFile) -> Path:
        """Where a shard is, or would be."""
        return self.directory / f"{file.sha256}.arrow"

    def _is_good(self, path: Path, sha256: str) -> bool:
        """Whether it is there with the right content, which is read once by each process."""
        try:
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if self._checked.get(sha256) == inode:
                    return True
                is_good = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except FileNotFoundError:
            return False
        if is_good:
            self._checked[sha256] = inode
        else:
            logger.warning("The cached shard %s is damaged and is fetched again.", path)
            path.unlink(missing_ok=True)
        return is_good

    @contextlib.contextmanager
    def _staged(self, path: Path) -> Iterator[int]:
        """A new file beside the place of a shard, which no one else writes meanwhile."""
        part = path.with_suffix(".part")
        while True:
            with _locked(part) as staged:
                # Whoever had it before us renamed or deleted it, and it is no longer that file.
                if not _is_at(staged, part):
                    continue
                try:
                    yield staged
                finally:
                    if _is_at(staged, part):
                        part.unlink()
                return

    def _make_room(self, file: RemoteFile, keep: Keep, staged: int) -> bool:
        """Deletes the oldest shards and takes the room; False where it is others' fetches'."""
        with self._lock():
            found = self._scan()
            kept = {self.path_of(other) for other in keep()}
            if sum(found[p].st_size for p in kept & found.keys()) + file.num_bytes > self.max_bytes:
                raise CacheFullError(file.path)
            total = sum(status.st_size for status in found.values())
            oldest = sorted(found, key=lambda path: (found[path].st_mtime_ns, path))
            for path in oldest:
                if total + file.num_bytes <= self.max_bytes:
                    break
                if path.suffix == ".arrow" and path not in kept:
                    path.unlink(missing_ok=True)
                    total -= found[path].st_size
            if total + file.num_bytes > self.max_bytes:
                return False
            os.ftruncate(staged, file.num_bytes)  # counts from now on
        return True

    def _scan(self) -> dict[Path, os.stat_result]:
        """All files; what killed processes left half fetched is deleted. Under the lock."""
        found = {}
        for path in self.directory.iterdir():
            if path.suffix == ".part" and _unlink_abandoned(path):
                continue
            with contextlib.suppress(FileNotFoundError):  # found damaged just now
                found[path] = path.stat()
        return found

    def _lock(self) -> contextlib.AbstractContextManager[int]:
        """Of the directory: what is in it changes under it, but for damaged files."""
        return _locked(self.directory / "lock")

    def _read(self, file: RemoteFile, tries_again: bool) -> bytes:
        """The content from the root, checked."""

        def is_lasting(error: StorageError) -> bool:
            return not tries_again or _is_forbidden(error) or self._closed.is_set()

        try:
            content = self._patience.until_done(
                lambda: self._storage.read(file.path), f"{file.path} is not read", is_lasting
            )
        except FileNotFoundError as error:
            raise damaged(self._storage, file.path) from error
        except StorageError as error:
            if tries_again or _is_forbidden(error):
                raise
            raise PassingError(str(error)) from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise damaged(self._storage, file.path)
        return content

    @contextlib.contextmanager
    def _as_storage_error(self, kind: type[Exception] = StorageError) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise kind(
                f"The shard cache in {self.directory} cannot be used: {error.strerror or error}. "
                f"Free space there, lower data.cache_bytes, or set {DIRECTORY_VARIABLE} to a "
                "directory on a local disk that can be written."
            ) from error


def _is_forbidden(error: StorageError) -> bool:
    return isinstance(error.__cause__, PermissionError)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of a file, made if need be, that no one else has locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlink_abandoned(part: Path) -> bool:
    """Deletes what a killed process left half fetched; False where it is being fetched."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, part):
            part.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
