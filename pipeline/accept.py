"""`accept-reference`: pins another evaluation for a model, and scores its champion under it.

The score comes first and the pin last: killed anywhere, the old evaluation holds, and the same
command goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import parse_config
from pipeline.cycles import hold_cycle
from pipeline.driver import Basis, bring_about, make_plan
from pipeline.errors import BusyError, ConfigError
from pipeline.holding import hashes_of, latest_findings, released
from pipeline.identities import OnHash
from pipeline.pinning import (
    PINNED,
    add_score,
    describe,
    file_hashes,
    input_hashes,
    is_pinned,
    pin_first,
    read_document,
    read_step,
)
from pipeline.registry import Registry, open_registry
from pipeline.settings import Config, DataConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow import Event, Observer

OF_THE_CHAMPION = ("model", "diffusion", "train")  # sections that belong to its weights


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
        theirs = parse_config(champion["config"], f"version {champion['number']}")
        sections: dict[str, Any] = {name: getattr(theirs, name) for name in OF_THE_CHAMPION}
        sections["tune"] = config.tune.model_copy(update={"enabled": False})
        sections["data"] = _without_held(registry, config, champion, observer)
        scoring = config.model_copy(update=sections)
        train = read_step(storage, "train", champion["lineage"]["train"])
        basis = Basis({"train": train})
        planned = make_plan(scoring, ("evaluate",), basis=basis, on_hash=on_hash)
        manifests = bring_about(scoring, planned, observer=observer)
        evaluate = manifests["evaluate"]
        if evaluate["key"] != champion["lineage"]["evaluate"]:
            add_score(registry, champion["number"], evaluate, reason)
        keys = {name: manifests[name]["key"] for name in (*PINNED, "preprocess")}
        score, evaluations = evaluate["metrics"], registry.evaluations()
        if is_pinned(evaluations[-1], keys):
            return Accepted(evaluations[-1], False, champion["number"], score)
        document = describe(keys, score["protocol"], reason)
        entry = registry.add_record("evaluations", evaluations, document)
        if entry is None:
            raise BusyError(
                f"Another evaluation was pinned for {config.name} meanwhile. Look at it, and do "
                "this again if it is still right."
            )
        return Accepted(entry, True, champion["number"], score)


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


def config_of_champion(storage: Storage, name: str) -> Config:
    """The config of a model's champion, with this storage root.

    Args:
        storage: the root.
        name: of the model.

    Raises:
        ConfigError: there is no such model, it has no champion, or the config is not one any more.
    """
    champion = open_registry(storage, name).champion()
    if champion is None:
        raise ConfigError(f"The model {name} has no champion. Promote a version, or give a config.")
    config = parse_config(champion["config"], f"version {champion['number']}")
    return config.model_copy(
        update={"storage": config.storage.model_copy(update={"root": storage.uri})}
    )
