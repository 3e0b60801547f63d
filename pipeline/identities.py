"""What identifies the content of an input file: its SHA-256, computed as rarely as can be.

A file is hashed only when its identity (size and etag, or size, mtime, ctime and inode) is not
the one remembered in the storage root, so that planning does not download a data set. Reading a
file checks that its content is still that of its hash.
"""

import contextlib
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import DataError, RaydiffusionError, StorageError
from pipeline.escaping import show
from pipeline.known_hashes import KnownHashes
from pipeline.storage import Storage

READ_BYTES = 1 << 20
HASH_THREADS = 8
SAVE_BYTES = 1 << 28  # hashed between two saves of what is remembered
CLOCK_TICK_S = 0.02  # file times are no finer; two changes within one look like one
_STAMPS = (  # those of the content, or else those of time, which stores tell in several ways
    ("ETag", "etag", "md5Hash", "Content-MD5", "Digest"),
    ("LastModified", "Last-Modified", "last_modified", "mtime", "created"),
)

OnHash = Callable[[int, int], None]


Identity = tuple[Any, ...]


@dataclass(frozen=True)
class InputFile:
    """A file of the input.

    Args:
        name: its path below the fixed part of the pattern that matches it, or more of it where
            two would be alike; printable.
        uri: local path or fsspec URI.
        num_bytes: its size.
        identity: what changes when the content does; None: nothing tells.
        sha256: of the content; None: it is remote and was not read yet.
        is_named: by its own path, not by a glob or directory.
        class_name: of the directory it lies in below the fixed part, as it is; empty at the top.
        fault: why it is no file to read, in words; empty where it is one.
    """

    name: str
    uri: str
    num_bytes: int
    identity: Identity | None
    sha256: str | None = None
    is_named: bool = False
    class_name: str = ""
    fault: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether it is read through fsspec."""
        return "://" in self.uri


def identity_of(facts: os.stat_result | dict[str, Any]) -> tuple[int, Identity | None]:
    """Size, and what changes when the content does, without reading it."""
    if isinstance(facts, os.stat_result):
        stamps = (facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
        return facts.st_size, (facts.st_size, *stamps)
    for keys in _STAMPS:
        found = [facts[key] for key in keys if facts.get(key) is not None]
        if found:
            stamps = (str(v.timestamp() if isinstance(v, datetime) else v) for v in found)
            return facts["size"], (facts["size"], *stamps)
    return facts["size"], None


def is_web(uri: str) -> bool:
    """Whether it is read by HTTP."""
    return uri.startswith(("http://", "https://"))


def hash_files(
    files: Sequence[InputFile],
    storage: Storage,
    *,
    read_remote: bool,
    on_hash: OnHash | None = None,
) -> list[InputFile]:
    """The files with their hashes, from memory where the identity is unchanged.

    Hashes are remembered as they are made, so that a kill loses little of the work.

    Args:
        files: what the sources match.
        storage: the root that remembers.
        read_remote: whether unknown remote files are read; otherwise they get no hash.
        on_hash: told the number of files and bytes about to be read.

    Raises:
        DataError: a file cannot be read.
    """
    known = KnownHashes(storage, (file.uri for file in files))
    hashes = {f.uri: hashlib.sha256(f.fault.encode()).hexdigest() for f in files if f.fault}
    for file in files:
        if file.identity is not None and (sha256 := known.get(file.uri, file.identity)):
            hashes[file.uri] = sha256
    unknown = [f for f in files if f.uri not in hashes and (read_remote or not f.is_remote)]
    if unknown:
        if on_hash is not None:
            on_hash(len(unknown), sum(file.num_bytes for file in unknown))
        _outlast_the_clock_tick(unknown)
        num_unsaved = 0
        try:
            for file, sha256 in _iter_hashes(unknown):
                hashes[file.uri] = sha256
                if file.identity is not None:
                    known.add(file.uri, file.identity, sha256)
                num_unsaved += file.num_bytes
                if num_unsaved >= SAVE_BYTES:
                    known.save()
                    num_unsaved = 0
        finally:
            known.save()
    return [replace(file, sha256=hashes.get(file.uri)) for file in files]


def _iter_hashes(files: Sequence[InputFile]) -> Iterator[tuple[InputFile, str]]:
    """Each file with its hash, in the order in which they are done."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        try:
            futures = {pool.submit(_hash, file.uri): file for file in files}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def open_once(file: InputFile) -> "Iterator[CheckedReader]":
    """Opens a file to be read once from its start.

    Its content is checked when the block ends without an error: by its identity, before and after,
    or by its hash where that is not the one of the plan.

    Raises:
        DataError: it cannot be read, or is no longer what it was.
    """
    with _open(file.uri) as opened:
        is_same = file.identity is not None and _current_identity(file) == file.identity
        reader = CheckedReader(file.uri, opened, is_hashed=not is_same)
        yield reader
        if is_same and _current_identity(file) == file.identity:
            return
        if (_hash(file.uri) if is_same else reader.read_all()) != file.sha256:
            raise _changed(file.uri)


@contextlib.contextmanager
def open_seekable(file: InputFile) -> Iterator[IO[bytes]]:
    """Opens a file to be read at random; a remote one by way of a temporary copy.

    Its content is checked as by `open_once`, a hash before the block begins.

    Raises:
        DataError: it cannot be read, or is no longer what it was.
        StorageError: there is no room for the copy.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_open(file.uri))
        before = _current_identity(file)
        if before is None or before != file.identity:
            reader = CheckedReader(file.uri, opened, is_hashed=True)
            if file.is_remote:
                opened = stack.enter_context(tempfile.TemporaryFile())
                _copy(reader, opened, file.uri)
            if reader.read_all() != file.sha256:
                raise _changed(file.uri)
            opened.seek(0)
        yield cast(IO[bytes], _CheckedFile(opened, file.uri))
        if _current_identity(file) != before and _hash(file.uri) != file.sha256:
            raise _changed(file.uri)


class _CheckedFile(io.RawIOBase):
    """A file to be read at random, whose errors are those of its storage."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file, self._uri = file, uri

    def read(self, size: int | None = -1, /) -> bytes:
        with as_data_error(self._uri):
            return self._file.read(-1 if size is None else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with as_data_error(self._uri):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _copy(reader: "CheckedReader", copy: IO[bytes], uri: str) -> None:
    """Writes what is left to read into a temporary file."""
    try:
        while content := reader.read(READ_BYTES):
            copy.write(content)
        copy.flush()
    except OSError as error:
        raise StorageError(
            f"Cannot keep a copy of {show(uri)} in {tempfile.gettempdir()}: "
            f"{error.strerror or error}. Free space there, or set TMPDIR to another directory."
        ) from error


def check_readable(file: InputFile) -> None:
    """Opens a file where this runs and reads its first byte.

    Raises:
        DataError: it cannot be read here.
    """
    with _open(file.uri) as opened, as_data_error(file.uri):
        opened.read(1)


class CheckedReader:
    """A file to be read once from its beginning, hashing what passes if need be."""

    def __init__(self, uri: str, file: IO[bytes], *, is_hashed: bool) -> None:
        self._uri, self._file = uri, file
        self._digest = hashlib.sha256() if is_hashed else None

    def read(self, size: int = -1) -> bytes:
        """Reads on.

        Raises:
            DataError: it cannot be read.
        """
        with as_data_error(self._uri):
            content = self._file.read(size)
            while 0 < len(content) < size and (more := self._file.read(size - len(content))):
                content += more  # what comes by HTTP comes in pieces
        if self._digest is not None:
            self._digest.update(content)
        return content

    def read_all(self) -> str:
        """Reads to the end; the SHA-256 of the whole file."""
        while self.read(READ_BYTES):
            pass
        assert self._digest is not None  # asked only of those that hash
        return self._digest.hexdigest()


@contextlib.contextmanager
def as_data_error(uri: str) -> Iterator[None]:
    """For reading: the errors of many libraries all mean that this cannot be read."""
    try:
        yield
    except RaydiffusionError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(
            f"Cannot read {show(uri)}: {show(reason)}. Check that it exists, that it may be read, "
            "and for s3:// or gs:// that raydiffusion[s3] or [gcs] is installed."
        ) from error


@contextlib.contextmanager
def _open(uri: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        with as_data_error(uri):
            if "://" in uri:
                import fsspec

                # Servers that give no ranges are read from the start to the end.
                options: Any = {"block_size": 0} if is_web(uri) else {}
                file: Any = stack.enter_context(fsspec.open(uri, "rb", **options))
            else:
                file = stack.enter_context(Path(uri).open("rb"))
        yield file


def _hash(uri: str) -> str:
    with _open(uri) as file:
        return CheckedReader(uri, file, is_hashed=True).read_all()


def _current_identity(file: InputFile) -> Identity | None:
    """That of a local file; asking for a remote one's would cost a request."""
    if file.is_remote:
        return None
    with as_data_error(file.uri):
        return identity_of(os.stat(file.uri))[1]


def _outlast_the_clock_tick(files: Sequence[InputFile]) -> None:
    """Waits until a change from now on is sure to change the identity."""
    changed = [f.identity[2] / 1e9 for f in files if not f.is_remote and f.identity]
    if changed and time.time() - max(changed) < CLOCK_TICK_S:
        time.sleep(CLOCK_TICK_S)


def _changed(uri: str) -> DataError:
    return DataError(
        f"{show(uri)} changed since the run was planned. Run the same command again: it takes the "
        "input as it is then."
    )
