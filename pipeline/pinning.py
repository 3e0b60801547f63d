"""The evaluation that a model pins: its reference and extractor, and the scores of its versions.

`models/<name>/evaluations/000001.json` names the steps `features` and `reference` whose results the
gate and the score over time use. The first is pinned with the first version; another one, whoever
retrains, only by `accept-reference` (`accept.py`). A version's own score is in its record; scores
that it got later are `models/<name>/scores/<version>-<key of the step evaluate>.json`.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from pipeline.errors import StorageError
from pipeline.registry import Registry, user
from pipeline.storage import Storage
from pipeline.workflow import read_artifact, read_manifest

PINNED = ("features", "reference")  # steps
FACTS = (
    "reference_split",
    "reference_count",
    "extractor",
    "extractor_sha256",
    "feature_width",
)  # of a protocol
DATA_SET = "dataset.json"  # artifact of the step `preprocess`
FIRST = "the evaluation of the first version"


def pin_first(registry: Registry) -> dict[str, Any]:
    """The evaluation that is pinned; that of the first version where none is.

    Args:
        registry: of a model that has a version.

    Raises:
        StorageError: a record cannot be read or written.
    """
    while not (evaluations := registry.evaluations()):
        first = registry.versions()[0]
        keys = {name: first["lineage"][name] for name in (*PINNED, "preprocess")}
        registry.add_record("evaluations", (), describe(keys, first["score"]["protocol"], FIRST))
    return evaluations[-1]


def describe(keys: Mapping[str, str], protocol: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The record of a pinned evaluation, without its number.

    Args:
        keys: of the manifests of `features`, `reference` and `preprocess`, whose images they are.
        protocol: of a score under it.
        reason: for those who read it later.
    """
    return {
        **{name: keys[name] for name in PINNED},
        "data": keys["preprocess"],
        "facts": {name: protocol.get(name) for name in FACTS},
        "protocol": dict(protocol),
        "reason": reason,
        "by": user(),
        "time": time.time(),
    }


def pinned_protocol(registry: Registry, evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The protocol of the score that an evaluation was pinned with.

    Args:
        registry: of the model.
        evaluation: its record.
    """
    if "protocol" in evaluation:
        return evaluation["protocol"]
    # Pinned before it was kept: that of the first score under the reference and the extractor.
    scores = [score for version in registry.versions() for score in scores_of(registry, version)]
    wanted = (evaluation["reference"], evaluation["facts"]["extractor_sha256"])
    found = [score["protocol"] for score in scores]
    return next(p for p in found if (p["reference"], p.get("extractor_sha256")) == wanted)


def is_pinned(evaluation: Mapping[str, Any], lineage: Mapping[str, str]) -> bool:
    """Whether a version was scored under an evaluation.

    Args:
        evaluation: its record.
        lineage: of the version.
    """
    return all(evaluation[name] == lineage[name] for name in PINNED)


def pinned_manifests(storage: Storage, evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifests of the steps that an evaluation pins, by name.

    Raises:
        StorageError: one is gone.
    """
    return {name: read_step(storage, name, evaluation[name]) for name in PINNED}


def read_step(storage: Storage, step: str, key: str) -> dict[str, Any]:
    """The manifest of a step that the registry names.

    Raises:
        StorageError: it is gone.
    """
    manifest = read_manifest(storage, step, key)
    if manifest is None:
        raise StorageError(
            f"{storage.uri}/steps/{step}/{key} is gone, which the registry names. Bring it back "
            "from a copy, or run the config that made it again, with the data it had."
        )
    return manifest


def input_hashes(storage: Storage, key: str) -> set[str]:
    """The SHA-256 of the input shards of a data set.

    Args:
        storage: the root.
        key: of the step `preprocess`.

    Raises:
        StorageError: its manifest is gone.
    """
    manifest = read_step(storage, "preprocess", key)
    return set(manifest["identity"]["settings"]["shards"].values())


def read_document(storage: Storage, key: str) -> dict[str, Any]:
    """The document of a data set that the registry names.

    Args:
        storage: the root.
        key: of the step `preprocess`.

    Raises:
        StorageError: it, or the manifest, is gone.
    """
    return json.loads(read_artifact(storage, read_step(storage, "preprocess", key), DATA_SET))


def file_hashes(document: Mapping[str, Any]) -> set[str]:
    """The SHA-256 of the input files of a data set.

    Args:
        document: of it.
    """
    return {file["sha256"] for shard in document["inputs"] for file in shard["files"]}


def find_score(
    registry: Registry, version: Mapping[str, Any], protocol: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The score of a version under a protocol, its own or one that it got later, or None.

    Args:
        registry: of the model.
        version: its record.
        protocol: that the score must have.
    """
    for score in scores_of(registry, version):
        if not score_differences(version, score, protocol):
            return score
    return None


def score_differences(
    version: Mapping[str, Any], score: Mapping[str, Any], protocol: Mapping[str, Any]
) -> list[str]:
    """The fields in which a score of a version differs from a protocol.

    Args:
        version: its record.
        score: of it.
        protocol: that is wanted.
    """
    from pipeline.protocol import MIX, differences  # torch: only where scores are compared

    found = differences(protocol, score["protocol"])
    if version["config"]["model"]["class_conditional"] and MIX not in score["protocol"]:
        found.append(MIX)  # scored before labels were those of the reference
    return found


def scores_of(registry: Registry, version: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All scores of a version, its own first.

    Args:
        registry: of the model.
        version: its record.
    """
    later = [r["score"] for r in registry.records("scores") if r["version"] == version["number"]]
    return [version["score"], *later]


def add_score(registry: Registry, version: int, evaluate: Mapping[str, Any], reason: str) -> None:
    """Keeps a score that a version got later; one of the same step stays as it is.

    Args:
        registry: of the model.
        version: its number.
        evaluate: the manifest of the step.
        reason: for those who read it later.
    """
    document = {
        "version": version,
        "evaluate": evaluate["key"],
        "score": evaluate["metrics"],
        "reason": reason,
        "by": user(),
        "time": time.time(),
    }
    registry.create("scores", f"{version:06d}-{evaluate['key']}", document)
