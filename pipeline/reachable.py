"""What must stay below a storage root: all that runs, versions and pinned evaluations reach.

A run's record reaches the results and the begun work of its steps, and what these read; so does
what a cycle of `retrain` tells of its work beside runs while it goes on. A version of a model
reaches the results that it was made of; the champion also the checkpoints with which its training
can go on. What is then left over is deleted by `garbage.py`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from pipeline.leases import find_living
from pipeline.lineage import is_made_by
from pipeline.registry import Registry, damaged_record
from pipeline.runs import directory_of_cycle, read_needs, read_record
from pipeline.storage import Storage, damaged
from pipeline.units import units_of_step
from pipeline.workflow import hash_json, read_artifact, read_manifest

DATA_SET, EXTRACTOR = "dataset.json", "extractor.safetensors"  # artifacts that others rest on
_KEY = re.compile(r"[0-9a-f]{32}")
_READ_OTHERWISE = ("versions", "promotions", "lease-", "retrain/")


@dataclass
class Reached:
    """What must stay.

    Args:
        runs: whose records stay, by name.
        paths: directories below the root.
        extractors: keys of those whose features stay.
        files: SHA-256 of the Arrow files whose features stay.
    """

    runs: list[str] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    extractors: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    def holds(self, path: str) -> bool:
        """Whether something must stay, by its path below the root."""
        if path.startswith("features/"):
            _, extractor, name = path.split("/", 2)
            return extractor in self.extractors and name.partition(".")[0] in self.files
        return path in self.paths


def find_reached(
    storage: Storage, written: Mapping[str, float | None], *, keep_runs: int, since: float
) -> Reached:
    """Follows every record to what it rests on.

    Args:
        storage: the root.
        written: when the newest file was written in each directory of a run or of a result, by its
            path; None where the storage does not tell.
        keep_runs: of each model name, the latest so many runs stay, however old.
        since: seconds since the epoch; what was written later stays, with what it rests on.

    Raises:
        StorageError: a record or a manifest cannot be read, so that it cannot be told what is
            needed.
    """
    young = {path for path, time in written.items() if time is None or time >= since}
    results = [path.split("/")[1:] for path in written if path.startswith("steps/")]
    walk = _Walk(storage, Reached(), {key: [] for _, key in results})
    for step, key in results:
        walk.steps_of_key[key].append(step)
    models, runs = storage.list("models"), storage.list("runs")
    leased = [directory_of_cycle(name) for name in models] + [f"runs/{name}" for name in runs]
    living = find_living(storage, leased)
    champions: dict[str, dict[str, Any] | None] = {}
    for name in models:
        registry = Registry(storage, name)
        champions[name] = registry.champion()
        for version in registry.versions():
            walk.add_version(version)
        if (champion := champions[name]) is not None and "checkpoint" in champion:
            walk.reached.paths.add(f"steps/train/{champion['checkpoint']['series']}")
        for key in _keys_named(storage, f"models/{name}"):
            walk.add_key(key)
        if directory_of_cycle(name) in living and (needs := read_needs(storage, name)) is not None:
            walk.add_needs(needs)
    for document in _runs_that_stay(storage, runs, champions, keep_runs, young | living):
        walk.add_run(document)
    for step, key in results:
        if f"steps/{step}/{key}" in young and step != "shard":  # which rests on no other
            walk.add_step(step, key)
    walk.reached.runs.sort()
    return walk.reached


class _Walk:
    """Marks what is reached, each result once."""

    def __init__(
        self, storage: Storage, reached: Reached, steps_of_key: dict[str, list[str]]
    ) -> None:
        self.storage, self.reached, self.steps_of_key = storage, reached, steps_of_key
        self._seen: set[tuple[str, str]] = set()

    def add_run(self, document: Mapping[str, Any]) -> None:
        """All that a run's steps have made or begun, and its own pages."""
        self.reached.runs.append(document["run"])
        self.reached.paths.add(f"runs/{document['run']}")
        self.add_needs(document)

    def add_needs(self, document: Mapping[str, Any]) -> None:
        """All that some steps have made or begun."""
        self.reached.paths.update(document["directories"].values())
        for step, identity in document["identities"].items():
            self.add_step(step, hash_json(identity), identity)

    def add_version(self, version: Mapping[str, Any]) -> None:
        """The results that a version was made of."""
        for step, key in version.get("lineage", {}).items():
            self.add_step(step, key)

    def add_key(self, key: str) -> None:
        """The results of this key, of whichever step."""
        for step in self.steps_of_key.get(key, ()):
            self.add_step(step, key)

    def add_step(self, step: str, key: str, identity: Mapping[str, Any] | None = None) -> None:
        """The result of a step, or what is begun of it, and what it rests on."""
        if (step, key) in self._seen:
            return
        self.reached.paths.add(f"steps/{step}/{key}")
        manifest = read_manifest(self.storage, step, key)
        identity = (manifest or {}).get("identity") or identity
        if identity is None:  # begun; what it rests on is known to the run that began it
            return
        self._seen.add((step, key))
        for name, of_input in identity.get("inputs", {}).items():
            self.add_step(name, of_input)
        settings = identity.get("settings", {})
        if "model_key" in settings:
            self.reached.paths.add(f"models-elsewhere/{settings['model_key']}")
        for value in settings.values():  # such as the training that another one begins from
            if isinstance(value, str):
                self.add_key(value)
        artifacts = (manifest or {}).get("artifacts", {})
        if DATA_SET in artifacts:
            assert manifest is not None
            self._add_data_set(json.loads(read_artifact(self.storage, manifest, DATA_SET)))
        elif "shards" in settings:
            self.reached.paths.update(units_of_step(settings))
        if EXTRACTOR in artifacts:
            from pipeline.extractors.naming import extractor_key  # torch: only here

            assert manifest is not None
            self.reached.extractors.add(extractor_key(manifest))
        if step == "tune":
            self._add_trials(f"steps/tune/{key}/trials")

    def _add_data_set(self, document: Mapping[str, Any]) -> None:
        for shard in document["shards"]:
            self.reached.paths.add(shard["directory"])
            self.reached.files.update(file["sha256"] for file in shard["files"])

    def _add_trials(self, directory: str) -> None:
        for name in self.storage.list(directory):
            entry = _read_json(self.storage, f"{directory}/{name}/proposal.json")
            if entry is not None:
                self.add_step("trial", entry["key"])


def _runs_that_stay(
    storage: Storage,
    runs: Sequence[str],
    champions: Mapping[str, Mapping[str, Any] | None],
    keep_runs: int,
    young: Set[str],
) -> Iterator[Mapping[str, Any]]:
    """Runs that are at work, recent, among the latest of their name, or that made a champion."""
    found = [read_record(storage, name) for name in runs]
    documents = [document for document in found if document is not None]
    documents.sort(key=lambda document: document["executions"][-1]["started"], reverse=True)
    seen: dict[str, int] = {}
    for document in documents:
        name, path = document["name"], f"runs/{document['run']}"
        seen[name] = seen.get(name, 0) + 1
        if (
            seen[name] <= keep_runs
            or path in young
            or is_made_by(champions.get(name) or {}, document["identities"])
        ):
            yield document


def _keys_named(storage: Storage, directory: str) -> Iterator[str]:
    """All keys that documents of a model name, but for versions and promotions."""
    for file in storage.files(directory):
        name = file.path.removeprefix(f"{directory}/")
        is_hidden = name.rpartition("/")[2].startswith(".")  # staged, or a file manager's
        if name.startswith(_READ_OTHERWISE) or is_hidden or not name.endswith(".json"):
            continue
        yield from _KEY.findall(json.dumps(_read_json(storage, file.path)))


def _read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        of_model = path.startswith("models/")
        raise (damaged_record if of_model else damaged)(storage, path) from error
