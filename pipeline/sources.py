"""The images that a run starts from: which shards there are, and what identifies them.

A shard is identified by the SHA-256 of its content, computed only when its identity (size and
etag, or size, mtime, ctime and inode) is not the one remembered in the storage root. Reading
images out of shards is in `preprocess.py`.
"""

import contextlib
import glob
import hashlib
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DataError, RaydiffusionError, StorageError
from pipeline.storage import Storage

IDENTITIES = "cache/identities.json"
READ_BYTES = 1 << 22
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)  # compressed ones too


@dataclass(frozen=True)
class InputShard:
    """A tar file of images. `name` is its path below the fixed part of its pattern."""

    name: str
    uri: str
    sha256: str
    num_bytes: int


def list_input_shards(patterns: Sequence[str], storage: Storage) -> list[InputShard]:
    """Finds the shards that the patterns name, by name, with the hash of each.

    Args:
        patterns: local paths, globs or fsspec URIs of tar files.
        storage: the root that remembers hashes.

    Raises:
        DataError: a pattern matches nothing, two shards share a name, or a shard is empty or
            no tar file.
    """
    remembered = _remembered(storage)
    known = dict(remembered)
    shards: dict[str, InputShard] = {}
    for pattern in patterns:
        found = _match(pattern)
        if not found:
            raise DataError(
                f"There are no shards at {pattern}. Check data.sources: each entry is a path, a "
                "glob such as shards/*.tar, or a URI."
            )
        for name, uri in found:
            if name in shards and shards[name].uri != uri:
                raise DataError(
                    f"Two shards are called {name}: {shards[name].uri} and {uri}. Rename one."
                )
            size, identity = _identity(uri)
            entry = known.get(uri)
            if entry is None or entry["identity"] != identity:
                entry = {"identity": identity, "sha256": _hash_and_check(uri, size)}
                known[uri] = entry
            shards[name] = InputShard(name, uri, entry["sha256"], size)
    if known != remembered:
        with contextlib.suppress(StorageError):  # a cache; the preflight judges the root
            storage.replace(IDENTITIES, json.dumps(known, indent=1).encode())
    return [shards[name] for name in sorted(shards)]


@contextlib.contextmanager
def open_source(uri: str) -> Iterator[Any]:
    """Opens a shard for reading, local or by any fsspec URI.

    Raises:
        DataError: it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        with as_data_error(uri):
            if "://" in uri:
                import fsspec

                file: Any = stack.enter_context(fsspec.open(uri, "rb"))
            else:
                file = stack.enter_context(Path(uri).open("rb"))
        yield file


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


def _match(pattern: str) -> list[tuple[str, str]]:
    """(name, URI) of what a pattern matches; names are relative to its fixed part."""
    if "://" in pattern:
        with as_data_error(pattern):
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(pattern)
            protocol = pattern.split("://", 1)[0]
            matches = sorted(filesystem.glob(path) if glob.has_magic(path) else [path])
        return [(os.path.basename(m), f"{protocol}://{m}") for m in matches]
    fixed = Path()
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(_unescape(part)) and part == _unescape(part):
            break
        fixed /= _unescape(part)
    matches = sorted(m for m in glob.glob(pattern, recursive=True) if Path(m).is_file())
    return [(Path(m).relative_to(fixed).as_posix(), m) for m in matches]


def _unescape(part: str) -> str:
    """Takes back what glob.escape did to a part of a path."""
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _identity(uri: str) -> tuple[int, list[Any]]:
    """Size, and what changes when the content does, without reading it."""
    with as_data_error(uri):
        if "://" in uri:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(uri)
            facts = filesystem.info(path)
            stamps = [facts.get(k) for k in ("ETag", "etag", "md5Hash", "LastModified", "mtime")]
            return facts["size"], [facts["size"], *(str(s) for s in stamps if s is not None)]
        stat = os.stat(uri)
        return stat.st_size, [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash_and_check(uri: str, size: int) -> str:
    if size == 0:
        raise DataError(
            f"The shard {uri} is empty (0 bytes). Write it again or leave it out of data.sources."
        )
    with open_source(uri) as file, as_data_error(uri):
        _check_has_members(uri, file)
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_has_members(uri: str, file: IO[bytes]) -> None:
    try:
        with tarfile.open(fileobj=file, mode="r:*") as tar:
            first = tar.next()
    except TAR_ERRORS as error:
        raise DataError(
            f"The shard {uri} is no readable tar file ({error}). Write it again or leave it out "
            "of data.sources."
        ) from error
    if first is None:
        raise DataError(
            f"The shard {uri} holds no files. Write it again or leave it out of data.sources."
        )


def _remembered(storage: Storage) -> dict[str, Any]:
    try:
        return json.loads(storage.read(IDENTITIES))
    except (FileNotFoundError, json.JSONDecodeError, StorageError):
        return {}  # a cache: without it every shard is read once more
