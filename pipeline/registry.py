"""The registry: versions of a model with their lineage, and which one is the champion.

`models/<name>/versions/000007.json` and `models/<name>/promotions/000003.json` are created
once and never changed; the champion is what the highest promotion names.
"""

import getpass
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.leases import hold_lease
from pipeline.protocol import differences
from pipeline.storage import Storage
from pipeline.workflow import StepContext


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

    def champion(self) -> dict[str, Any] | None:
        """The version that is in use, or None."""
        promotions = self.promotions()
        if not promotions:
            return None
        number = promotions[-1]["version"]
        return next(v for v in self.versions() if v["number"] == number)

    def add_version(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Records a version under the next number; one with the same `key` is found again."""
        return self._add("versions", document, same=lambda v: v["key"] == document["key"])

    def promote(self, version: int, reason: str) -> dict[str, Any]:
        """Makes a version the champion, with who, when and why."""
        document = {
            "version": version,
            "reason": reason,
            "by": _user(),
            "time": time.time(),
        }
        champion = self.champion()
        return self._add(
            "promotions",
            document,
            same=lambda _: champion is not None and champion["number"] == version,
        )

    def _add(self, kind: str, document: Mapping[str, Any], same: Any) -> dict[str, Any]:
        while True:
            present = self._read_all(kind)
            for entry in present:
                if same(entry):
                    return entry
            number = present[-1]["number"] + 1 if present else 1
            entry = {"number": number, **document}
            path = f"models/{self.name}/{kind}/{number:06d}.json"
            if self.storage.create(path, json.dumps(entry, indent=1).encode()):
                return entry  # otherwise another took the number: look again

    def _read_all(self, kind: str) -> list[dict[str, Any]]:
        directory = f"models/{self.name}/{kind}"
        names = self.storage.list(directory)
        return [json.loads(self.storage.read(f"{directory}/{name}")) for name in names]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers run under ids that have no name
        return f"uid {os.getuid()}"


def promote(context: StepContext) -> dict[str, Any]:
    """The step `promote`: records the version, and makes it champion if it scores better.

    The first version of a name is its champion. A later one is promoted when its score is
    lower under the same protocol; under another protocol the two are not compared.
    """
    registry = Registry(context.storage, context.config.name)
    score = context.inputs["evaluate"]["metrics"]
    version = registry.add_version(
        {
            "key": context.inputs["train"]["key"] + "/" + context.inputs["evaluate"]["key"],
            "score": score,
            "lineage": {name: manifest["key"] for name, manifest in context.inputs.items()},
            "weights": context.inputs["train"]["artifacts"]["ema.safetensors"]["sha256"],
            "created": time.time(),
        }
    )
    with hold_lease(context.storage, f"models/{registry.name}"):  # judge one at a time
        is_promoted, reason = _judge(score, registry.champion(), version["number"])
        if is_promoted:
            registry.promote(version["number"], reason)
    context.note(f"version {version['number']} {'promoted' if is_promoted else 'kept'}: {reason}")
    return {"version": version["number"], "promoted": is_promoted, "reason": reason}


def _judge(
    score: Mapping[str, Any], champion: Mapping[str, Any] | None, version: int
) -> tuple[bool, str]:
    if champion is None:
        return True, "it is the first version"
    if champion["number"] == version:
        return True, "it is the champion already"
    theirs = champion["score"]
    if differing := differences(score["protocol"], theirs["protocol"]):
        return False, (
            f"its score is not comparable with version {champion['number']}'s: the protocols "
            f"differ in {', '.join(differing)}"
        )
    comparison = f"{score['value']:.3f} against {theirs['value']:.3f} of the champion"
    return score["value"] < theirs["value"], f"{score['metric']} {comparison}"
