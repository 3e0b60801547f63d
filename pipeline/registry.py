"""The registry: versions of a model with their lineage, and which one is the champion.

`models/<name>/versions/000007.json` and `models/<name>/promotions/000003.json` are created
once and never changed; the champion is what the highest promotion names. Each is one file, so that
there is no half of it. What a version came from is in `lineage.py`.
"""

import contextlib
import getpass
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BusyError, ConfigError, StorageError
from pipeline.leases import hold_lease
from pipeline.lineage import describe_version
from pipeline.storage import Storage
from pipeline.workflow import StepContext

PROMOTION, ROLLBACK = "promotion", "rollback"
SHOWN = 10  # of the versions there are


@dataclass(frozen=True)
class Registry:
    """The versions and promotions of one model name."""

    storage: Storage
    name: str

    def versions(self) -> list[dict[str, Any]]:
        """All versions, the oldest first."""
        return self._read_all("versions")

    def promotions(self) -> list[dict[str, Any]]:
        """All promotions, the oldest first: the audit line."""
        return self._read_all("promotions")

    def version(self, number: int) -> dict[str, Any]:
        """One version.

        Raises:
            ConfigError: there is none of that number.
        """
        versions = self.versions()
        for document in versions:
            if document["number"] == number:
                return document
        known = ", ".join(str(v["number"]) for v in versions[-SHOWN:]) or "none"
        raise ConfigError(
            f"The model {self.name} below {self.storage.uri} has no version {number}. The latest "
            f"there: {known}."
        )

    def champion(self) -> dict[str, Any] | None:
        """The version that is in use, or None."""
        promotions = self.promotions()
        return self.version(promotions[-1]["version"]) if promotions else None

    def add_version(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Records a version under the next number; one with the same `key` is found again."""
        while True:
            versions = self.versions()
            for present in versions:
                if present["key"] == document["key"]:
                    return present
            if entry := self._create("versions", versions, document):
                return entry  # otherwise another took the number: look again

    def promote(self, version: int, reason: str, *, after: int | None = None) -> dict[str, Any]:
        """Makes a version the champion, with who, when and why.

        It is one record, created once. Of two at once one is made, and the other is told.

        Args:
            version: its number. That of the champion changes nothing.
            reason: for those who read it later.
            after: the number of the promotion that this one was decided upon, 0 for none; the
                latest there is if not given.

        Raises:
            BusyError: another version was promoted meanwhile.
            ConfigError: there is no such version.
        """
        self.version(version)
        return self._promote(version, reason, PROMOTION, after)

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

    def _promote(self, version: int, reason: str, kind: str, after: int | None) -> dict[str, Any]:
        promotions = self.promotions()
        last = promotions[-1] if promotions else {"number": 0, "version": None}
        if last["version"] == version:
            return last
        if after is not None and last["number"] != after:
            raise self._overtaken(version, last)
        document = {
            "version": version,
            "kind": kind,
            "replaces": last["version"],
            "reason": reason,
            "by": _user(),
            "time": time.time(),
        }
        if entry := self._create("promotions", promotions, document):
            return entry
        last = self.promotions()[-1]
        if last["version"] == version:
            return last  # another did the same
        raise self._overtaken(version, last)

    def _overtaken(self, version: int, last: Mapping[str, Any]) -> BusyError:
        return BusyError(
            f"Version {last['version']} of {self.name} was promoted meanwhile by {last['by']} "
            f"({last['reason']}), and version {version} was not. Look at it, and do this again if "
            "it is still right."
        )

    def _create(
        self, kind: str, present: Sequence[Mapping[str, Any]], document: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Creates the next record; None where another has come first."""
        entry = {"number": present[-1]["number"] + 1 if present else 1, **document}
        path = f"models/{self.name}/{kind}/{entry['number']:06d}.json"
        return entry if self.storage.create(path, json.dumps(entry, indent=1).encode()) else None

    def _read_all(self, kind: str) -> list[dict[str, Any]]:
        directory = f"models/{self.name}/{kind}"
        return [self._read(f"{directory}/{name}") for name in self.storage.list(directory)]

    def _read(self, path: str) -> dict[str, Any]:
        try:
            return json.loads(self.storage.read(path))
        except (FileNotFoundError, ValueError) as error:  # records are never changed or deleted
            raise StorageError(
                f"{self.storage.uri}/{path} is missing or no JSON, and the registry cannot be read "
                "without it. Bring it back from a copy; a new one must not take its number."
            ) from error


def list_models(storage: Storage) -> list[str]:
    """The names of the models that have versions."""
    return [name for name in storage.list("models") if storage.list(f"models/{name}/versions")]


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


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # containers run under ids that have no name
        name = f"uid {os.getuid()}"
    return f"{name}@{platform.node()}"


def promote(context: StepContext) -> dict[str, Any]:
    """The step `promote`: records the version, and makes it champion if it scores better.

    The first version of a name is its champion. A later one is promoted when its score is
    lower under the same protocol; under another protocol the two are not compared.
    """
    registry = Registry(context.storage, context.config.name)
    score = context.inputs["evaluate"]["metrics"]
    document = describe_version(context.config, context.inputs, registry.versions())
    version = registry.add_version(document)
    with hold_lease(context.storage, f"models/{registry.name}"):  # judge one at a time
        while True:
            promotions = registry.promotions()
            champion = registry.version(promotions[-1]["version"]) if promotions else None
            is_promoted, reason = _judge(score, champion, version["number"])
            if not is_promoted:
                break
            after = promotions[-1]["number"] if promotions else 0
            with contextlib.suppress(BusyError):  # a person promoted another: judge against that
                registry.promote(version["number"], reason, after=after)
                break
    context.note(f"version {version['number']} {'promoted' if is_promoted else 'kept'}: {reason}")
    return {"version": version["number"], "promoted": is_promoted, "reason": reason}


def _judge(
    score: Mapping[str, Any], champion: Mapping[str, Any] | None, version: int
) -> tuple[bool, str]:
    if champion is None:
        return True, "it is the first version"
    if champion["number"] == version:
        return True, "it is the champion already"
    from pipeline.protocol import differences  # torch: only here

    theirs = champion["score"]
    if differing := differences(score["protocol"], theirs["protocol"]):
        return False, (
            f"its score is not comparable with version {champion['number']}'s: the protocols "
            f"differ in {', '.join(differing)}"
        )
    comparison = f"{score['value']:.3f} against {theirs['value']:.3f} of the champion"
    return score["value"] < theirs["value"], f"{score['metric']} {comparison}"
