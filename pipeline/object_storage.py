"""A storage root on an object store, through fsspec.

Objects appear whole or not at all. Stores differ in how they say that there is one already, and
that another writer is at it.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import Content, StoredFile, as_storage_error, join_content

CONFLICT_DELAYS_S = (0.1, 0.2, 0.4, 0.8, 1.6)  # while another writes the same object
# What s3fs knows no exception for: codes of S3, or of an answer that has no body.
CONFLICTS = ("ConditionalRequestConflict", "OperationAborted", "409")
EXISTS = ("PreconditionFailed", "412")  # of stores that do not say which condition


@dataclass(frozen=True)
class ObjectStorage:
    """A prefix of an object store, through fsspec. Objects appear whole or not at all."""

    uri: str

    def create(self, path: str, content: Content) -> bool:
        whole = join_content(content)
        with as_storage_error("write", self._path(path)):
            delays = iter(CONFLICT_DELAYS_S)
            while True:
                try:
                    self._filesystem.pipe_file(self._path(path), whole, mode="create")
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if (code := _code_of(error)) in EXISTS:
                        return False
                    if code not in CONFLICTS or (delay_s := next(delays, None)) is None:
                        raise
                    time.sleep(delay_s)

    def replace(self, path: str, content: bytes) -> None:
        with as_storage_error("write", self._path(path)):
            self._filesystem.pipe_file(self._path(path), content)

    def read(self, path: str) -> bytes:
        with as_storage_error("read", self._path(path)):
            return self._filesystem.cat_file(self._path(path))

    def exists(self, path: str) -> bool:
        with as_storage_error("look for", self._path(path)):
            self._filesystem.invalidate_cache()
            try:
                self._filesystem.info(self._path(path))  # fsspec's `exists` says no to any error
            except FileNotFoundError:
                return False
            return True

    def list(self, directory: str) -> list[str]:
        with as_storage_error("list", self._path(directory)):
            self._filesystem.invalidate_cache()
            try:
                paths = self._filesystem.ls(self._path(directory), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            itself = self._filesystem._strip_protocol(self._path(directory))
        names = {
            path.rstrip("/").rsplit("/", 1)[-1] for path in paths if path.rstrip("/") != itself
        }
        return sorted(name for name in names if not name.startswith("."))

    def files(self, directory: str) -> Iterator[StoredFile]:
        filesystem, path = self._filesystem, self._path(directory)
        with as_storage_error("list", path):
            filesystem.invalidate_cache()
            found = filesystem.find(path, detail=True)
        start = len(filesystem._strip_protocol(self.uri)) + 1
        for name, facts in sorted(found.items()):
            yield StoredFile(name[start:], int(facts.get("size") or 0), _time_written(facts))

    def delete(self, path: str) -> None:
        with (
            as_storage_error("delete", self._path(path)),
            contextlib.suppress(FileNotFoundError),
        ):
            self._filesystem.invalidate_cache()  # what another process wrote must be found
            self._filesystem.rm(self._path(path), recursive=True)

    def clean(self, directory: str) -> None:
        pass  # an object is there whole or not at all

    def _path(self, path: str) -> str:
        return f"{self.uri}/{path}"

    @property
    def _filesystem(self) -> Any:
        import fsspec  # only here: local roots must not pay for it

        try:
            # fsspec keeps one instance per process.
            return fsspec.core.url_to_fs(self.uri)[0]
        except ImportError as error:
            scheme = self.uri.partition(":")[0]
            extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme)
            raise StorageError(
                f"Storage at {self.uri} needs a library that is not installed ({error}). "
                f"Install {f'raydiffusion[{extra}]' if extra else 'it'} on every node."
            ) from error


def _code_of(error: OSError) -> str:
    """The code of S3 that an error was made of, or nothing."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _time_written(facts: Mapping[str, Any]) -> float | None:
    """Of an object, from what its listing says; each kind of store has its own word."""
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        value = facts.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
