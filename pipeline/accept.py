"""`accept-reference`: pins another evaluation for a model, and scores its champion under it.

The score comes first and the pin last: killed anywhere, the old evaluation holds, and the same
command goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.comparable import check_champion
from pipeline.config import override_config, parse_config, with_absolute_paths
from pipeline.cycles import hold_cycle
from pipeline.driver import Basis
from pipeline.errors import BusyError, ConfigError
from pipeline.holding import hashes_of, latest_findings, released
from pipeline.identities import OnHash
from pipeline.pinning import (
    PINNED,
    describe,
    file_hashes,
    input_hashes,
    is_pinned,
    pin_first,
    pinned_protocol,
    read_document,
)
from pipeline.registry import Registry, open_registry
from pipeline.rescore import score_version
from pipeline.settings import ClusterConfig, Config, DataConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow import Event, Observer

# Settings that say where something is, and not what is scored.
PLACES = ("cluster.", "features.weights=")


@dataclass(frozen=True)
class Accepted:
    """What `accept-reference` did: the evaluation that is pinned, and the champion's score."""

    evaluation: dict[str, Any]
    is_new: bool
    version: int
    score: dict[str, Any]


def accept_reference(
    config: Config,
    *,
    observer: Observer,
    reason: str | None = None,
    on_hash: OnHash | None = None,
) -> Accepted:
    """Pins the evaluation of a config's present data set and extractor.

    Args:
        config: whose sources, extractor and settings of `evaluate` it is.
        observer: told what happens.
        reason: for those who read it later.
        on_hash: told the number of files and bytes that are read before there is a plan.

    Raises:
        ConfigError: there is no such model, or it has no champion.
        BusyError: another process retrains this model.
        RaydiffusionError: with the sentence for the user and the exit code.
    """
    storage = open_storage(config.storage.root)
    registry = open_registry(storage, config.name)
    reason = reason or "accepted"
    with hold_cycle(registry):
        pin_first(registry)
        champion = registry.champion()
        if champion is None:
            raise ConfigError(
                f"The model {config.name} has no champion to be scored again. Promote a version."
            )
        while True:
            manifests = _score(registry, config, champion, observer, reason, on_hash)
            latest = registry.champion()
            if latest is None or latest == champion:
                break
            champion = latest  # a person promoted another meanwhile: it is scored as well
        keys = {name: manifests[name]["key"] for name in (*PINNED, "preprocess")}
        score, evaluations = manifests["evaluate"]["metrics"], registry.evaluations()
        is_there = is_pinned(evaluations[-1], keys)
        if is_there and not _other_settings(registry, evaluations[-1], score):
            return Accepted(evaluations[-1], False, champion["number"], score)
        document = describe(keys, score["protocol"], reason)
        entry = registry.add_record("evaluations", evaluations, document)
        if entry is None:
            raise BusyError(
                f"Another evaluation was pinned for {config.name} meanwhile. Look at it, and do "
                "this again if it is still right."
            )
        return Accepted(entry, True, champion["number"], score)


def _other_settings(
    registry: Registry, evaluation: Mapping[str, Any], score: Mapping[str, Any]
) -> list[str]:
    """The settings in which a score is not that which an evaluation was pinned with."""
    from pipeline.protocol import differing_settings  # torch: not where nothing is accepted

    return differing_settings(score["protocol"], pinned_protocol(registry, evaluation))


def _score(
    registry: Registry,
    config: Config,
    champion: Mapping[str, Any],
    observer: Observer,
    reason: str,
    on_hash: OnHash | None,
) -> dict[str, dict[str, Any]]:
    """Scores a champion by the present data set; the manifests of the steps."""
    check_champion(
        registry,
        champion,
        config.data.test_fraction,
        of="the present data set",
        remedy="Lower data.test_fraction to that, or `raydiffusion run CONFIG`, promote the "
        "version it makes, and do this again.",
    )
    data = _without_held(registry, config, champion, observer)
    return score_version(
        registry,
        config.model_copy(update={"data": data}),
        champion,
        basis=Basis({}),
        observer=observer,
        reason=reason,
        on_hash=on_hash,
    )


def _without_held(
    registry: Registry, config: Config, champion: Mapping[str, Any], observer: Observer
) -> DataConfig:
    """The section `data` without what is held: neither released, passed nor trained on since."""
    held = [r for r in latest_findings(registry).values() if r["state"] == "held"]
    taken = released(registry)
    if hashes_of(held) - taken:
        key = champion["lineage"]["preprocess"]
        taken |= input_hashes(registry.storage, key)
        if any("files" in record for record in held):
            taken |= file_hashes(read_document(registry.storage, key))
    left_out = sorted(hashes_of(held) - taken)
    if left_out:
        names = ", ".join(sorted({r["shard"] for r in held if hashes_of([r]) - taken}))
        text = f"held shards take no part: {names}. `retrain --accept-held SHARD` takes one in"
        observer(Event("note", "accept", {"text": text}))
    return config.data.model_copy(update={"leave_out": (*config.data.leave_out, *left_out)})


def config_of_champion(storage: Storage, name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a model's champion, with this storage root and without the cluster it was on.

    Args:
        storage: the root.
        name: of the model.
        overrides: `section.key=value` of `PLACES`; paths are relative to the working directory.

    Raises:
        ConfigError: there is no such model, it has no champion, the config is not one any more, or
            another setting is overridden.
    """
    if wrong := [text for text in overrides if not text.startswith(PLACES)]:
        raise ConfigError(
            f"--set {wrong[0].partition('=')[0]} cannot be set for a model's name, which means its "
            "champion's config as it was trained; settings of cluster and features.weights can. "
            "Leave it out, or give a config."
        )
    champion = open_registry(storage, name).champion()
    if champion is None:
        raise ConfigError(f"The model {name} has no champion. Promote a version, or give a config.")
    config = parse_config(champion["config"], f"version {champion['number']}")
    here = {
        "storage": config.storage.model_copy(update={"root": storage.uri}),
        "cluster": ClusterConfig(),  # that of the job that made it is gone by now
    }
    config = override_config(config.model_copy(update=here), overrides)
    return with_absolute_paths(config, Path.cwd())
