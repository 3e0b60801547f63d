"""A champion is scored again: under an evaluation that is to be pinned, or one that is.

A rollback past `accept-reference`, a promotion by hand or another release of a library leave a
champion without a score under the pinned evaluation, and no challenger could be judged. So a cycle
scores it first. The score is kept with the version; killed before, the same call goes on.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.comparable import check_champion, expected_protocol
from pipeline.config import parse_config
from pipeline.driver import Basis, bring_about
from pipeline.identities import OnHash
from pipeline.pinning import add_score, find_score, read_step
from pipeline.registry import Registry
from pipeline.settings import Config
from pipeline.subject_kinds import Rescored
from pipeline.workflow import Event, Observer

OF_ITS_WEIGHTS = ("model", "diffusion", "train")  # sections that are those of a version


def score_champion(registry: Registry, config: Config, basis: Basis, *, observer: Observer) -> None:
    """Scores the champion of the moment under the pinned evaluation, where it has no such score.

    Args:
        registry: of the model.
        config: of the cycle, whose scores it is to be compared with.
        basis: of the cycle.
        observer: told what happens.

    Raises:
        ConfigError: it was trained on images that test it.
        RaydiffusionError: with the sentence for the user and the exit code.
    """
    champion = registry.champion()
    if champion is None:
        return
    expected = expected_protocol(config, registry.storage, basis.pinned)
    if find_score(registry, champion, expected) is not None:
        return
    storage, reference = registry.storage, basis.pinned["reference"]
    data = read_step(storage, "preprocess", reference["identity"]["inputs"]["preprocess"])
    check_champion(
        registry,
        champion,
        data["identity"]["settings"]["data.test_fraction"],
        of=f"evaluation {basis.evaluation}",
        remedy="Promote another version, or roll back.",
    )
    from pipeline.protocol import OF_THE_PROGRAM  # torch: not where nothing is new

    text = (
        f"version {champion['number']}, the champion, has no score under evaluation "
        f"{basis.evaluation}, and gets it first"
    )
    observer(Event("note", "retrain", {"text": text}))
    own = read_step(storage, "preprocess", champion["lineage"]["preprocess"])
    score_version(
        registry,
        config,
        champion,
        basis=replace(basis, pinned={**basis.pinned, "preprocess": own}),
        subject=Rescored(tuple((n, expected[n]) for n in OF_THE_PROGRAM if n in expected)),
        observer=observer,
        reason=f"the champion had no score under evaluation {basis.evaluation}",
    )


def score_version(
    registry: Registry,
    config: Config,
    version: Mapping[str, Any],
    *,
    basis: Basis,
    observer: Observer,
    reason: str,
    subject: Rescored | None = None,
    on_hash: OnHash | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a version as a config says, and keeps the score; all manifests by step name.

    Args:
        registry: of the model.
        config: how it is scored; what belongs to its weights is its own.
        version: its record.
        basis: whose pinned results are taken in place of the config's.
        observer: told what happens.
        reason: for those who read it later.
        subject: where a score of the same key may be there under another protocol.
        on_hash: told the number of files and bytes that are read before there is a plan.

    Raises:
        RaydiffusionError: with the sentence for the user and the exit code.
    """
    theirs = parse_config(version["config"], f"version {version['number']}")
    sections: dict[str, Any] = {name: getattr(theirs, name) for name in OF_ITS_WEIGHTS}
    sections["tune"] = config.tune.model_copy(update={"enabled": False})
    scoring = config.model_copy(update=sections)
    train = read_step(registry.storage, "train", version["lineage"]["train"])
    basis = replace(basis, pinned={**basis.pinned, "train": train})
    manifests = bring_about(
        scoring, ("evaluate",), subject=subject, basis=basis, observer=observer, on_hash=on_hash
    )
    evaluate = manifests["evaluate"]
    if evaluate["key"] != version["lineage"]["evaluate"]:
        add_score(registry, version["number"], evaluate, reason)
    return manifests
