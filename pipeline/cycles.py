"""The records of `retrain`: its cycles, what became of them, and input shards that are held.

    models/<name>/cycles/000004.json            what a cycle began with; the latest one counts
    models/<name>/outcomes/000004.json          how it ended; missing: it goes on with the next call
    models/<name>/held/<SHA-256>-<evaluation>.json   a shard that is unlike the pinned reference
    models/<name>/released/<SHA-256>.json       a held one that a person took in

All are created once and never changed. `models/<name>/retrain` holds the lease of who is at it. The
cycle itself is in `retrain.py`.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import BusyError, ConfigError
from pipeline.leases import hold_alone
from pipeline.registry import Registry, user
from pipeline.runs import directory_of_cycle
from pipeline.scores import show_number
from pipeline.sources import InputShard

if TYPE_CHECKING:
    from pipeline.scores.drift import Drift  # numpy and torch: not to read a record

PREFIX = 8  # characters of a hash that name a shard, at least


@contextlib.contextmanager
def hold_cycle(registry: Registry) -> Iterator[None]:
    """Keeps others from retraining a model, or pinning for it, while the block runs.

    Raises:
        BusyError: another process does.
    """
    doing = f"retrains {registry.name}, or pins another reference for it,"
    remedy = "Wait for it; the same command then finds what it did."
    with hold_alone(registry.storage, directory_of_cycle(registry.name), doing, remedy=remedy):
        yield


def last_cycle(registry: Registry) -> dict[str, Any] | None:
    """The latest cycle, with its `outcome` or None for one that is not over; None: there is none.

    Args:
        registry: of the model.
    """
    cycles = registry.records("cycles", last=1)
    if not cycles:
        return None
    outcomes = registry.records("outcomes", last=1)  # of this cycle or an earlier one
    ended = {outcome["number"]: outcome for outcome in outcomes}
    return {**cycles[0], "outcome": ended.get(cycles[0]["number"])}


def begin_cycle(registry: Registry, document: Mapping[str, Any]) -> dict[str, Any]:
    """Records what a cycle begins with.

    Args:
        registry: of the model, whose cycle this process holds.
        document: its key, shards, champion, start and evaluation.

    Raises:
        BusyError: another process began one, its lease being taken for dead.
    """
    full = {**document, "by": user(), "time": time.time()}
    cycle = registry.add_record("cycles", registry.records("cycles", last=1), full)
    if cycle is None:
        raise BusyError(f"{registry.name} is being retrained by another process. Wait for it.")
    return cycle


def end_cycle(registry: Registry, number: int, outcome: Mapping[str, Any]) -> None:
    """Records how a cycle ended; what is recorded already stays.

    Args:
        registry: of the model.
        number: of the cycle.
        outcome: its state, version, reason, run, and the shards that were held.
    """
    full = {"number": number, **outcome, "by": user(), "time": time.time()}
    registry.create("outcomes", f"{number:06d}", full)


def hold_shard(
    registry: Registry, shard: InputShard, evaluation: int, drift: "Drift"
) -> dict[str, Any]:
    """Records that a shard is held, with the numbers; returns the record.

    Args:
        registry: of the model.
        shard: the input shard, by its content.
        evaluation: the number of the pinned one.
        drift: how far it is.
    """
    document = {
        "shard": shard.name,
        "sha256": shard.sha256,
        "evaluation": evaluation,
        "reason": describe_drift(drift),
        "distance": drift.distance,
        "largest": drift.largest,
        "limit": drift.limit,
        "count": drift.count,
        "by": user(),
        "time": time.time(),
    }
    registry.create("held", f"{shard.sha256}-{evaluation:06d}", document)
    return document


def describe_drift(drift: "Drift") -> str:
    """The numbers in words."""
    return (
        f"{drift.count:,} of its items are {show_number(drift.distance)} from the reference, and "
        f"as many random real images are at most {show_number(drift.largest)}, with "
        f"retrain.drift_factor {show_number(drift.limit)}"
    )


def held_shards(registry: Registry) -> list[dict[str, Any]]:
    """The shards that are held under the pinned evaluation and were not released.

    Args:
        registry: of the model.
    """
    pinned, taken = len(registry.evaluations()), released(registry)
    return [
        record
        for record in registry.records("held")
        if record["evaluation"] == pinned and record["sha256"] not in taken
    ]


def released(registry: Registry) -> set[str]:
    """The SHA-256 of the shards that a person took in.

    Args:
        registry: of the model.
    """
    return {record["sha256"] for record in registry.records("released")}


def release_shard(registry: Registry, which: str, reason: str) -> dict[str, Any]:
    """Takes a held shard in, with who, when and why; returns the record of its being held.

    Args:
        registry: of the model.
        which: its name, or the beginning of its SHA-256.
        reason: for those who read it later.

    Raises:
        ConfigError: no shard of that name is held, or several are.
    """
    every = {record["sha256"]: record for record in registry.records("held")}
    found = [
        record
        for sha256, record in every.items()
        if record["shard"] == which or (len(which) >= PREFIX and sha256.startswith(which))
    ]
    if len(found) != 1:
        named = ", ".join(f"{r['shard']} ({r['sha256'][:PREFIX]})" for r in every.values())
        what = "Several held shards are" if found else "No held shard is"
        raise ConfigError(
            f"{what} called {which!r}. Those held for {registry.name}: {named or 'none'}. Give the "
            "name of one, or the beginning of its SHA-256."
        )
    (record,) = found
    taken = {name: record[name] for name in ("shard", "sha256")}
    document = {**taken, "reason": reason, "by": user(), "time": time.time()}
    registry.create("released", record["sha256"], document)
    return record
