"""What a version of a model came from: its data, config, code, checkpoint, score and parent."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.probes import hash_code
from pipeline.settings import Config
from pipeline.steps import START_TRAINING
from pipeline.workflow import hash_json

NUM_STEPS = "train.num_steps"  # a training that goes on beyond it is the same one


def describe_version(
    config: Config,
    manifests: Mapping[str, Mapping[str, Any]],
    versions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The document of a version, but for its number.

    Its `key` is the same whenever the same training was scored in the same way. Its `parent` is the
    version whose training this one continues, or whose weights it began with; None where it began
    anew.

    Args:
        config: the whole config.
        manifests: of the steps before `promote`, by name.
        versions: those there are of the model.
    """
    train, evaluate = manifests["train"], manifests["evaluate"]
    checkpoint = {
        "series": series_of(train["identity"]),
        "global_step": train["metrics"]["num_steps"],
        "images_seen": train["metrics"]["images_seen"],
    }
    return {
        "key": f"{train['key']}/{evaluate['key']}",
        "created": time.time(),
        "score": evaluate["metrics"],
        "lineage": {name: manifest["key"] for name, manifest in manifests.items()},
        "weights": train["artifacts"]["ema.safetensors"]["sha256"],
        "checkpoint": checkpoint,
        "parent": find_parent(
            checkpoint, versions, train["identity"]["settings"].get(START_TRAINING)
        ),
        "config": config.model_dump(mode="json"),
        "code": code_version() | {"steps": _step_versions(manifests)},
    }


def find_parent(
    checkpoint: Mapping[str, Any],
    versions: Sequence[Mapping[str, Any]],
    start: str | None = None,
) -> int | None:
    """The number of the version whose training a checkpoint continues: the longest before it.

    Where there is none, that of the latest one whose weights the training began with.

    Args:
        checkpoint: of the new version.
        versions: those there are.
        start: the key of the training that it began with.
    """
    earlier = [
        (other["checkpoint"]["global_step"], other["number"])
        for other in versions
        if "checkpoint" in other  # those of the first weeks have none
        and other["checkpoint"]["series"] == checkpoint["series"]
        and other["checkpoint"]["global_step"] < checkpoint["global_step"]
    ]
    if earlier:
        return max(earlier)[1]
    begun_with = [v["number"] for v in versions if start and v["lineage"]["train"] == start]
    return max(begun_with, default=None)


def is_made_by(version: Mapping[str, Any], identities: Mapping[str, Any]) -> bool:
    """Whether a version is what a run made.

    Args:
        version: its document.
        identities: of the run's steps, by name, from its record.
    """
    lineage = version.get("lineage", {})
    return all(
        step in identities and step in lineage and hash_json(identities[step]) == lineage[step]
        for step in ("train", "evaluate")
    )


def ancestors(
    document: Mapping[str, Any], versions: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The versions that one came from, its parent first.

    Args:
        document: of the version.
        versions: all of the model.
    """
    numbered = {other["number"]: dict(other) for other in versions}
    found: list[dict[str, Any]] = []
    parent = document.get("parent")
    while parent in numbered and numbered[parent] not in found:
        found.append(numbered[parent])
        parent = numbered[parent].get("parent")
    return found


def series_of(identity: Mapping[str, Any]) -> str:
    """The same for all lengths of one training, from the identity of the step `train`."""
    kept = {key: value for key, value in identity["settings"].items() if key != NUM_STEPS}
    return hash_json({**identity, "settings": kept})


def code_version() -> dict[str, Any]:
    """The project's version, a hash of its modules, and the commit where it runs in a clone."""
    try:
        package = version("raydiffusion")
    except PackageNotFoundError:  # sent to a cluster that does not have it
        package = None
    return {"version": package, "sha256": hash_code(), "commit": _commit()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):  # there is no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _step_versions(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {name: manifest["identity"]["version"] for name, manifest in manifests.items()}
