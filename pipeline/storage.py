"""The storage root: a directory or any fsspec URI, written so that a reader never sees half.

`create` makes a file that was not there, whole or not at all, and tells whether it did;
`replace` swaps a file's content atomically. Everything durable in the project rests on these
two. Paths are relative to the root, with forward slashes. Object stores are in `object_storage.py`.
"""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import ConfigError, StorageError
from pipeline.processes import is_tag_dead, process_tag

Content = bytes | Sequence[memoryview]  # whole, or in parts

STORAGE_THREADS = 16  # object stores answer many small questions at once
_LARGE_BYTES = 1 << 20  # files that the system need not keep in memory once they are written
_STAGED = ".staged-"
STALE_S = 86_400.0  # a file that another host staged is left from a killed write after that
_seen: set[Path] = set()  # directories in which this process has looked for such files


@dataclass(frozen=True)
class StoredFile:
    """A file below the root: its path, its size, and when it was written.

    Args:
        path: below the root.
        num_bytes: its size.
        modified: seconds since the epoch; None where the storage does not tell.
    """

    path: str
    num_bytes: int
    modified: float | None

    @property
    def is_staged(self) -> bool:
        """Whether it is one that is being written, or was when its writer was killed."""
        return self.path.rpartition("/")[2].startswith(_STAGED)


class Storage(Protocol):
    """What steps may ask of the root. `uri` opens an equal one in another process."""

    @property
    def uri(self) -> str: ...

    def create(self, path: str, content: Content) -> bool:
        """Writes a new file whole; False, and nothing changed, when there is one already."""
        ...

    def replace(self, path: str, content: bytes) -> None:
        """Writes a file whole, over the one that may be there."""
        ...

    def read(self, path: str) -> bytes:
        """The content; FileNotFoundError when there is none."""
        ...

    def exists(self, path: str) -> bool: ...

    def list(self, directory: str) -> list[str]:
        """Sorted names directly below a directory, but for hidden ones, which are never ours.

        Empty when there is none, or a file.
        """
        ...

    def files(self, directory: str) -> Iterator[StoredFile]:
        """All files below a directory, also those that are being written."""
        ...

    def delete(self, path: str) -> None:
        """Removes a file or a whole directory; nothing happens when there is none."""
        ...

    def clean(self, directory: str) -> None:
        """Removes what writers that were killed left directly below a directory."""
        ...


def open_storage(root: str) -> Storage:
    """Opens a storage root by path or URI; nothing is created yet.

    Raises:
        ConfigError: it can be neither.
    """
    scheme, is_uri, rest = root.partition("://")
    if "\0" in root or (is_uri and not (scheme and rest.strip("/"))):
        raise ConfigError(
            f"A storage root must be a directory or a URI with a bucket, got {root!r}. Write for "
            'example storage.root = "runs" or "s3://bucket/runs".'
        )
    if is_uri and scheme != "file":
        from pipeline.object_storage import ObjectStorage  # rests on this module

        return ObjectStorage(root.rstrip("/"))
    try:
        path = Path(root.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"The storage root {root!r} is in the home of a user that there is not. Write ./ "
            "before it if a directory is called so."
        ) from error
    return LocalStorage(str(path.resolve()))


def claim(storage: Storage, path: str, content: bytes) -> bool:
    """Creates a file by whose content its writer is known; whether the one there is this writer's.

    An object store that has written may fail to say so, and the next try finds the file there.
    """
    if storage.create(path, content):
        return True
    try:
        return storage.read(path) == content
    except FileNotFoundError:  # it has come and gone
        return False


def check_writable(storage: Storage) -> None:
    """Proves that the root can be written and read back, and creates exclusively.

    Raises:
        StorageError: it cannot.
    """
    probe = f"probes/{uuid.uuid4().hex}"
    try:
        created = claim(storage, probe, b"1"), storage.create(probe, b"2")
        storage.read(probe)
    except FileNotFoundError as error:
        raise StorageError(
            f"Storage at {storage.uri} does not give back what was written a moment ago. Use a "
            "file system or object store that shows a new file at once."
        ) from error
    finally:
        with contextlib.suppress(StorageError):
            storage.delete(probe)
    if created != (True, False):
        raise StorageError(
            f"Storage at {storage.uri} does not refuse to overwrite, so that two runs could "
            "destroy each other's work. Use a file system or object store that creates "
            "exclusively."
        )


@dataclass(frozen=True)
class LocalStorage:
    """A directory. New content is linked or renamed into place, which is atomic.

    Until then it lies in a file beside its place, whose name tells the process that writes it. What
    a killed one leaves is removed by the next process that writes into the same directory.
    """

    uri: str

    def create(self, path: str, content: Content) -> bool:
        with self._staged(path, content) as staged:
            try:
                os.link(staged, self._path(path))
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                raise refused("write", path, "what was written is gone") from error
        return True

    def replace(self, path: str, content: bytes) -> None:
        with self._staged(path, content) as staged:
            try:
                staged.replace(self._path(path))
            except FileNotFoundError as error:
                raise refused("write", path, "what was written is gone") from error

    def read(self, path: str) -> bytes:
        with as_storage_error("read", self._path(path)):
            try:
                return self._path(path).read_bytes()
            except NotADirectoryError as error:  # below a file
                raise FileNotFoundError(str(error)) from error

    def exists(self, path: str) -> bool:
        with as_storage_error("look for", self._path(path)):
            try:
                self._path(path).stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def list(self, directory: str) -> list[str]:
        with as_storage_error("list", self._path(directory)):
            try:
                names = os.listdir(self._path(directory))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in names if not name.startswith("."))

    def files(self, directory: str) -> Iterator[StoredFile]:
        for parent, _, names in os.walk(self._path(directory), onerror=_raise_unless_gone):
            for name in names:
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                    status = path.lstat()
                    relative = path.relative_to(self.uri).as_posix()
                    yield StoredFile(relative, status.st_size, status.st_mtime)

    def delete(self, path: str) -> None:
        target = self._path(path)
        gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)  # or below a file
        with as_storage_error("delete", target), gone:
            if target.is_dir():
                import shutil

                shutil.rmtree(target)
            else:
                target.unlink()

    def clean(self, directory: str) -> None:
        _remove_stale(self._path(directory))

    def local_path(self, path: str) -> Path:
        """The file itself, to memory-map; remote ones are cached by `shard_cache.py`."""
        if not self._path(path).exists():
            raise damaged(self, path)
        return self._path(path)

    def _path(self, path: str) -> Path:
        return Path(self.uri, path)

    @contextlib.contextmanager
    def _staged(self, path: str, content: Content) -> Iterator[Path]:
        """The content in a file of its own beside the target, removed afterwards."""
        target = self._path(path)
        staged = target.parent / f"{_STAGED}{process_tag()}-{uuid.uuid4().hex}"
        with as_storage_error("write", target):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise refused("write", target, "a file is where the directory should be") from error
            except FileNotFoundError as error:  # the parents cannot be made, as below /proc
                raise refused("write", target, "its directory cannot be made") from error
            if target.parent not in _seen:
                _remove_stale(target.parent)
                _seen.add(target.parent)
            try:
                try:
                    file = staged.open("xb")
                except FileNotFoundError as error:
                    raise refused("write", target, "its directory is gone") from error
                with file:
                    file.writelines([content] if isinstance(content, bytes) else content)
                    file.flush()
                    os.fsync(file.fileno())  # after a power cut: the old, the new, never half
                    if size_of_content(content) >= _LARGE_BYTES:
                        _leave_to_disk(file.fileno())
                yield staged
            finally:
                staged.unlink(missing_ok=True)


def _leave_to_disk(descriptor: int) -> None:
    """Has the system drop its copy of a file on disk: many would displace what others read."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with contextlib.suppress(OSError):  # it is advice
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _raise_unless_gone(error: OSError) -> None:
    """What a walk does with a directory that cannot be listed."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        reason = error.strerror or str(error)
        raise refused("list", error.filename, reason) from error


def join_content(content: Content) -> bytes:
    """Content in one part."""
    return content if isinstance(content, bytes) else b"".join(content)


def hash_content(content: Content) -> str:
    """The SHA-256 of content."""
    digest = hashlib.sha256()
    for part in [content] if isinstance(content, bytes) else content:
        digest.update(part)
    return digest.hexdigest()


def size_of_content(content: Content) -> int:
    """Bytes of content."""
    return len(content) if isinstance(content, bytes) else sum(part.nbytes for part in content)


def in_bytes(count: float) -> str:
    """A size as a person reads it: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def hashed_name(name: str, sha256: str) -> str:
    """`ema.safetensors` as `ema-0123456789ab.safetensors`."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{sha256[:12]}{dot}{suffix}"


def damaged(storage: Storage, path: str) -> StorageError:
    """The error for a file whose content is not what its manifest says."""
    return StorageError(
        f"{storage.uri}/{path} is missing or not what its manifest says. Bring it back from a "
        f"copy, or delete the directory {path.rsplit('/', 1)[0]} below the storage root and run "
        "what made it again, with the same input: it is made anew."
    )


def _remove_stale(directory: Path) -> None:
    """Removes staged files of processes that are gone, and those a day old of other hosts."""
    with contextlib.suppress(OSError):  # it is not there, or another process cleans as well
        for path in [p for p in directory.iterdir() if p.name.startswith(_STAGED)]:
            tag = path.name.removeprefix(_STAGED).rpartition("-")[0]
            is_dead = is_tag_dead(tag)
            if is_dead is None:
                is_dead = time.time() - path.stat().st_mtime > STALE_S
            if is_dead:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def as_storage_error(verb: str, path: str | Path) -> Iterator[None]:
    """Lets FileNotFoundError and FileExistsError through: callers give them a meaning."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except (StorageError, KeyboardInterrupt):
        raise
    except Exception as error:  # object stores fail with the errors of many libraries
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise refused(verb, path, reason) from error


def refused(verb: str, path: str | Path, reason: str) -> StorageError:
    """The error for what the storage would not do."""
    return StorageError(
        f"Cannot {verb} {path}: {reason}. Check the path, its permissions and free space, or set "
        "storage.root to another place."
    )
