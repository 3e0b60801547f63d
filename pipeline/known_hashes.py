"""The storage root's memory of content hashes, by URI: a cache in a few files.

It serves whichever pattern finds a file. Without it every file is read once more.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import Storage

MAX_FORGOTTEN = 1 << 16  # entries of other files that a part keeps: of about 250 bytes each
_DIRECTORY = "cache/identities"


class KnownHashes:
    """The hashes of some files, and those found out meanwhile.

    Args:
        storage: the root that remembers.
        uris: of all files that may be asked for.
    """

    def __init__(self, storage: Storage, uris: Iterable[str]) -> None:
        self._storage = storage
        self._uris = set(uris)
        self._new: dict[str, dict[str, Any]] = {}  # by part, then URI
        self._parts = self._read({_part_of(uri) for uri in self._uris})

    def get(self, uri: str, identity: Iterable[Any]) -> str | None:
        """The hash of a file with this identity, if it is known."""
        entry = self._parts[_part_of(uri)].get(uri)
        return entry["sha256"] if entry and entry["identity"] == list(identity) else None

    def add(self, uri: str, identity: Iterable[Any], sha256: str) -> None:
        """Takes note of a hash; `save` keeps it."""
        entry = {"identity": list(identity), "sha256": sha256}
        self._new.setdefault(_part_of(uri), {})[uri] = entry

    def save(self) -> None:
        """Writes what is new beside what others wrote meanwhile."""
        now = self._read(self._new)
        for part, new in self._new.items():
            entries = {uri: entry for uri, entry in now[part].items() if uri not in new} | new
            others = [uri for uri in entries if uri not in self._uris]
            for uri in others[: max(0, len(others) - MAX_FORGOTTEN)]:  # the oldest
                del entries[uri]
            with contextlib.suppress(StorageError):  # the preflight judges the root
                self._storage.replace(f"{_DIRECTORY}/{part}.json", json.dumps(entries).encode())
        self._new = {}

    def _read(self, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
        def read(part: str) -> dict[str, Any]:
            try:
                return json.loads(self._storage.read(f"{_DIRECTORY}/{part}.json"))
            except (FileNotFoundError, ValueError, StorageError):
                return {}

        parts = list(parts)
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            return dict(zip(parts, pool.map(read, parts), strict=True))


def _part_of(uri: str) -> str:
    """One of 16, by the URI; names on a disk need be no UTF-8."""
    return hashlib.sha256(uri.encode(errors="surrogatepass")).hexdigest()[0]
