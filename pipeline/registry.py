"""The registry: versions of a model with their lineage, and which one is the champion.

`models/<name>/versions/000007.json` and `models/<name>/promotions/000003.json` are created
once and never changed; the champion is what the highest promotion names. Each is one file, so that
there is no half of it. What a version came from is in `lineage.py`, who promotes by itself in
`gate.py`, by what evaluation in `pinning.py`; cycles of `retrain` are recorded in `cycles.py`.
"""

import getpass
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BusyError, ConfigError, StorageError
from pipeline.storage import STORAGE_THREADS, Storage, claim

PROMOTION, ROLLBACK = "promotion", "rollback"
SHOWN = 10  # of the versions there are


@dataclass(frozen=True)
class Registry:
    """The versions and promotions of one model name."""

    storage: Storage
    name: str

    def versions(self) -> list[dict[str, Any]]:
        """All versions, the oldest first."""
        return self.records("versions")

    def promotions(self) -> list[dict[str, Any]]:
        """All promotions, the oldest first: the audit line."""
        return self.records("promotions")

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations that the model has pinned, the oldest first; the last one holds."""
        return self.records("evaluations")

    def version(self, number: int) -> dict[str, Any]:
        """One version.

        Raises:
            ConfigError: there is none of that number.
        """
        directory, name = f"models/{self.name}/versions", f"{number:06d}.json"
        names = self._names("versions")
        if name in names:
            return self._read(f"{directory}/{name}")
        known = ", ".join(str(int(name.partition(".")[0])) for name in names[-SHOWN:]) or "none"
        raise ConfigError(
            f"The model {self.name} below {self.storage.uri} has no version {number}. The latest "
            f"there: {known}."
        )

    def champion(self) -> dict[str, Any] | None:
        """The version that is in use, or None."""
        last = self.records("promotions", last=1)
        return self.version(last[0]["version"]) if last else None

    def add_version(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Records a version under the next number; one with the same `key` is found again."""
        while True:
            versions = self.versions()
            for present in versions:
                if present["key"] == document["key"]:
                    return present
            if entry := self.add_record("versions", versions, document):
                return entry  # otherwise another took the number: look again

    def promote(
        self, version: int, reason: str, *, after: int | None = None, replacing: int | None = None
    ) -> dict[str, Any]:
        """Makes a version the champion, with who, when and why.

        It is one record, created once. Of two at once one is made, and the other is told.

        Args:
            version: its number. That of the champion changes nothing.
            reason: for those who read it later.
            after: the number of the promotion that this one was decided upon, 0 for none; the
                latest there is if not given.
            replacing: the version that has to be the champion; any if not given.

        Raises:
            BusyError: another version was promoted meanwhile.
            ConfigError: there is no such version, or no champion that it could replace.
        """
        self.version(version)
        if replacing is not None and not self.records("promotions", last=1):
            raise ConfigError(
                f"The model {self.name} has no champion, and version {version} cannot come after "
                f"version {replacing}. Promote it without naming one."
            )
        return self._promote(version, reason, PROMOTION, after, replacing)

    def replaced(self, promotion: Mapping[str, Any]) -> dict[str, Any] | None:
        """The promotion that one came after, or None for the first."""
        number = promotion["number"] - 1
        return self._read(f"models/{self.name}/promotions/{number:06d}.json") if number else None

    def rollback(self, reason: str | None = None) -> dict[str, Any]:
        """Makes the champion before the champion the champion again: a promotion of its own kind.

        Rolled back again, it is the one before that. What was rolled back is not come back to.

        Args:
            reason: for those who read it later.

        Raises:
            BusyError: another version was promoted meanwhile.
            ConfigError: there is nothing to go back to.
        """
        promotions = self.promotions()
        line = line_of_champions(promotions)
        if len(line) < 2:
            now = f"version {line[0]}, its first" if line else "none"
            raise ConfigError(
                f"The model {self.name} below {self.storage.uri} has no champion to go back to: it "
                f"is {now}. Promote another version."
            )
        reason = reason or f"version {line[-1]} rolled back"
        return self._promote(line[-2], reason, ROLLBACK, promotions[-1]["number"])

    def _promote(
        self, version: int, reason: str, kind: str, after: int | None, replacing: int | None = None
    ) -> dict[str, Any]:
        promotions = self.records("promotions", last=1)
        last = promotions[-1] if promotions else {"number": 0, "version": None}
        if last["version"] == version:
            return last
        if after not in (None, last["number"]) or replacing not in (None, last["version"]):
            raise self._overtaken(version, last)
        document = {
            "version": version,
            "kind": kind,
            "replaces": last["version"],
            "reason": reason,
            "by": user(),
            "time": time.time(),
        }
        if entry := self.add_record("promotions", promotions, document):
            return entry
        (last,) = self.records("promotions", last=1)
        if last["version"] == version:
            return last  # another did the same
        raise self._overtaken(version, last)

    def _overtaken(self, version: int, last: Mapping[str, Any]) -> BusyError:
        return BusyError(
            f"Version {last['version']} of {self.name} was promoted meanwhile by {last['by']} "
            f"({last['reason']}), and version {version} was not. Look at it, and do this again if "
            "it is still right."
        )

    def add_record(
        self, kind: str, present: Sequence[Mapping[str, Any]], document: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Creates the next numbered record; None where another has come first.

        Args:
            kind: the directory, as `versions`.
            present: those there are of the kind; the last one is enough.
            document: of it; a number in it is replaced.
        """
        number = present[-1]["number"] + 1 if present else 1
        entry = {"number": number} | {k: v for k, v in document.items() if k != "number"}
        return entry if self.create(kind, f"{entry['number']:06d}", entry) else None

    def create(self, kind: str, name: str, document: Mapping[str, Any]) -> bool:
        """Creates a record of a name; False where there is one.

        Args:
            kind: the directory.
            name: of the record.
            document: all of it.
        """
        path = f"models/{self.name}/{kind}/{name}.json"
        return claim(self.storage, path, json.dumps(document, indent=1).encode())

    def records(self, kind: str, *, last: int | None = None) -> list[dict[str, Any]]:
        """The records of a kind, by name.

        Args:
            kind: the directory.
            last: only so many, from the end; all if not given.

        Raises:
            StorageError: one is missing or no JSON.
        """
        directory = f"models/{self.name}/{kind}"
        paths = [f"{directory}/{name}" for name in self._names(kind)[-last if last else 0 :]]
        with ThreadPoolExecutor(STORAGE_THREADS) as pool:
            return list(pool.map(self._read, paths))

    def _names(self, kind: str) -> list[str]:
        names = self.storage.list(f"models/{self.name}/{kind}")
        return [name for name in names if name.endswith(".json")]

    def _read(self, path: str) -> dict[str, Any]:
        try:
            return json.loads(self.storage.read(path))
        except (FileNotFoundError, ValueError) as error:
            raise damaged_record(self.storage, path) from error


def damaged_record(storage: Storage, path: str) -> StorageError:
    """The error for a record of the registry, which are never changed or deleted."""
    return StorageError(
        f"{storage.uri}/{path} is missing or no JSON, and the registry cannot be read without it. "
        "Bring it back from a copy; a new one must not take its number."
    )


def list_models(storage: Storage) -> list[str]:
    """The names of the models that have versions."""
    return [name for name in storage.list("models") if Registry(storage, name)._names("versions")]


def open_registry(storage: Storage, name: str) -> Registry:
    """The registry of a model that is there.

    Args:
        storage: the root.
        name: of the model.

    Raises:
        ConfigError: there is none of that name.
    """
    known = list_models(storage)
    if name not in known:
        raise ConfigError(
            f"There is no model {name!r} below {storage.uri}. Those there: "
            f"{', '.join(known) or 'none'}."
        )
    return Registry(storage, name)


def line_of_champions(promotions: Sequence[Mapping[str, Any]]) -> list[int]:
    """The champion, last, and those before it that a rollback would go back to.

    Args:
        promotions: all of a model, the oldest first.
    """
    line: list[int] = []
    for promotion in promotions:
        if promotion.get("kind") == ROLLBACK:
            line.pop()
        if not line or line[-1] != promotion["version"]:
            line.append(promotion["version"])
    return line


def user() -> str:
    """Who does something, and where: for the records."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # containers run under ids that have no name
        name = f"uid {os.getuid()}"
    return f"{name}@{platform.node()}"
