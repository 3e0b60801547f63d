"""What identifies the content of an input file: its SHA-256, computed as rarely as can be.

A file is hashed only when its identity (size and etag, or size, mtime, ctime and inode) is not
the one remembered in the storage root, so that planning does not download a data set. Reading a
file checks that its content is still that of its hash.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DataError, RaydiffusionError, StorageError
from pipeline.storage import Storage

READ_BYTES = 1 << 20
HASH_THREADS = 8
CLOCK_TICK_S = 0.02  # file times are no finer; two changes within one look like one
_STAMPS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")

OnHash = Callable[[int, int], None]


Identity = tuple[Any, ...]


@dataclass(frozen=True)
class InputFile:
    """A file of the input.

    Args:
        name: its path below the fixed part of the pattern that matches it.
        uri: local path or fsspec URI.
        num_bytes: its size.
        identity: what changes when the content does; None: nothing tells.
        sha256: of the content; None: it is remote and was not read yet.
        is_named: by its own path, not by a glob or directory.
    """

    name: str
    uri: str
    num_bytes: int
    identity: Identity | None
    sha256: str | None = None
    is_named: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether it is read through fsspec."""
        return "://" in self.uri


def identity_of(facts: os.stat_result | dict[str, Any]) -> tuple[int, Identity | None]:
    """Size, and what changes when the content does, without reading it."""
    if isinstance(facts, os.stat_result):
        stamps = (facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
        return facts.st_size, (facts.st_size, *stamps)
    found = [str(facts[key]) for key in _STAMPS if facts.get(key) is not None]
    return facts["size"], (facts["size"], *found) if found else None


def hash_files(
    files: Sequence[InputFile],
    storage: Storage,
    source: str,
    *,
    read_remote: bool,
    on_hash: OnHash | None = None,
) -> list[InputFile]:
    """The files with their hashes, from memory where the identity is unchanged.

    Args:
        files: what a source matches.
        storage: the root that remembers.
        source: the pattern; each has a memory of its own.
        read_remote: whether unknown remote files are read; otherwise they get no hash.
        on_hash: told the number of files and bytes about to be read.

    Raises:
        DataError: a file cannot be read.
    """
    path = f"cache/identities/{hashlib.sha256(source.encode()).hexdigest()[:16]}.json"
    remembered = _remembered(storage, path)
    hashes = {
        file.uri: entry["sha256"]
        for file in files
        if (entry := remembered.get(file.uri)) is not None
        and file.identity is not None
        and entry["identity"] == list(file.identity)
    }
    unknown = [f for f in files if f.uri not in hashes and (read_remote or not f.is_remote)]
    if unknown:
        if on_hash is not None:
            on_hash(len(unknown), sum(file.num_bytes for file in unknown))
        _outlast_the_clock_tick(unknown)
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            uris = [file.uri for file in unknown]
            hashes |= dict(zip(uris, pool.map(_hash, uris), strict=True))
    known = {
        file.uri: {"identity": list(file.identity), "sha256": hashes[file.uri]}
        for file in files
        if file.uri in hashes and file.identity is not None
    }
    if known != remembered:
        with contextlib.suppress(StorageError):  # a cache; the preflight judges the root
            storage.replace(path, json.dumps(known).encode())
    return [replace(file, sha256=hashes.get(file.uri)) for file in files]


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
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_open(file.uri))
        before = _current_identity(file)
        if before is None or before != file.identity:
            reader = CheckedReader(file.uri, opened, is_hashed=True)
            if file.is_remote:
                opened = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(reader, opened, READ_BYTES)
            if reader.read_all() != file.sha256:
                raise _changed(file.uri)
            opened.seek(0)
        yield opened
        if _current_identity(file) != before and _hash(file.uri) != file.sha256:
            raise _changed(file.uri)


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
            f"Cannot read {uri}: {reason}. Check that it exists, that it may be read, and for "
            "s3:// or gs:// that raydiffusion[s3] or [gcs] is installed."
        ) from error


@contextlib.contextmanager
def _open(uri: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        with as_data_error(uri):
            if "://" in uri:
                import fsspec

                file: Any = stack.enter_context(fsspec.open(uri, "rb"))
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
        f"{uri} changed since the run was planned. Run the same command again: it takes the input "
        "as it is then."
    )


def _remembered(storage: Storage, path: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read(path))
    except (FileNotFoundError, json.JSONDecodeError, StorageError):
        return {}  # a cache: without it every file is read once more
