"""What the drift test found: the records of `retrain` for input that is held, or was not judged.

    models/<name>/drift/<SHA-256>-<evaluation>-<cycle>.json   a lot's state, where it changed
    models/<name>/released/<SHA-256>.json                     a held one that a person took in

All are created once and never changed; of a lot the latest one counts. What passes and never was
anything else has no record. Which lots there are is in `lots.py`, how they are judged in
`drift.py`, what a cycle does with them in `screening.py`.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError
from pipeline.lots import Lot
from pipeline.registry import Registry, user
from pipeline.scores import show_number

if TYPE_CHECKING:
    from pipeline.scores.drift import Drift  # numpy and torch: not to read a record

LotState = Literal["held", "unjudged", "passed"]
PREFIX = 8  # characters of a hash that name a lot, at least
SHOWN = 3  # names in a sentence


def latest_findings(registry: Registry, before: int | None = None) -> dict[str, dict[str, Any]]:
    """The latest record of each lot that has one, by its SHA-256.

    Args:
        registry: of the model.
        before: the cycle whose records, and later ones, do not count; all count if not given.
    """
    records = registry.records("drift")
    if before is not None:
        records = [record for record in records if record["cycle"] < before]
    records.sort(key=lambda record: (record["evaluation"], record["cycle"]))
    return {record["sha256"]: record for record in records}


def held_shards(registry: Registry) -> list[dict[str, Any]]:
    """What is held under the pinned evaluation: found so last, and not released since.

    Args:
        registry: of the model.
    """
    return in_state(registry, latest_findings(registry), "held", len(registry.evaluations()))


def in_state(
    registry: Registry,
    findings: Mapping[str, Mapping[str, Any]],
    state: LotState,
    evaluation: int,
) -> list[dict[str, Any]]:
    """The records of a state under an evaluation, but for lots that were released.

    Args:
        registry: of the model.
        findings: from `latest_findings`.
        state: that is wanted.
        evaluation: the number of the pinned one.
    """
    taken = released(registry)
    return [
        dict(record)
        for sha256, record in findings.items()
        if (record["state"], record["evaluation"]) == (state, evaluation) and sha256 not in taken
    ]


def add_finding(
    registry: Registry,
    lot: Lot,
    state: LotState,
    reason: str,
    *,
    evaluation: int,
    cycle: int,
    last: Mapping[str, Any] | None = None,
    drift: "Drift | None" = None,
    items: Sequence[str] = (),
) -> dict[str, Any]:
    """Records what was found of a lot, where that is not what its last record says; returns it.

    Args:
        registry: of the model.
        lot: that was looked at.
        state: that it is in now.
        reason: in words.
        evaluation: the number of the pinned one.
        cycle: the number of this one.
        last: the lot's last record before this cycle.
        drift: how far it is, where it was judged.
        items: the hashes of those that were let in though they were not judged.
    """
    same = {"state": state, "evaluation": evaluation, "reason": reason}
    if last is not None and same.items() <= last.items():
        return dict(last)
    measured = {} if drift is None else {n: getattr(drift, n) for n in _NUMBERS}
    document = {
        "shard": lot.name,
        "sha256": lot.sha256,
        "cycle": cycle,
        **same,
        **measured,
        **({"files": dict(lot.files)} if lot.files else {}),
        **({"items": list(items)} if items else {}),
        "by": user(),
        "time": time.time(),
    }
    registry.create("drift", f"{lot.sha256}-{evaluation:06d}-{cycle:06d}", document)
    return document


_NUMBERS = ("distance", "largest", "limit", "count")


def describe_drift(drift: "Drift", whose: str = "its items") -> str:
    """The numbers in words.

    Args:
        drift: how far the items are.
        whose: items they are.
    """
    return (
        f"{drift.count:,} of {whose} are {show_number(drift.distance)} from the reference, and "
        f"as many random real images are at most {show_number(drift.largest)}, with "
        f"retrain.drift_factor {show_number(drift.limit)}"
    )


def said(names: Sequence[str]) -> str:
    """Names in a sentence, the first of them where there are many."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def hashes_of(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """The SHA-256 of the shards and loose files that lots consist of.

    Args:
        records: of the lots.
    """
    return {
        sha256
        for record in records
        for sha256 in (record.get("files", {}).values() or (record["sha256"],))
    }


def released(registry: Registry) -> set[str]:
    """The SHA-256 of the lots that a person took in, and of the loose files in them.

    Args:
        registry: of the model.
    """
    records = registry.records("released")
    return {record["sha256"] for record in records} | hashes_of(records)


def release_shard(registry: Registry, which: str, reason: str) -> dict[str, Any]:
    """Takes a held lot in, with who, when and why; returns the record of its being held.

    Args:
        registry: of the model.
        which: its name, or the beginning of its SHA-256.
        reason: for those who read it later.

    Raises:
        ConfigError: nothing of that name is held, or several are.
    """
    every = [r for r in latest_findings(registry).values() if r["state"] == "held"]
    found = [
        record
        for record in every
        if record["shard"] == which or (len(which) >= PREFIX and record["sha256"].startswith(which))
    ]
    if len(found) != 1:
        named = ", ".join(f"{r['shard']} ({r['sha256'][:PREFIX]})" for r in every)
        what = "Several held shards are" if found else "No held shard is"
        raise ConfigError(
            f"{what} called {which!r}. Those held for {registry.name}: {named or 'none'}. Give the "
            "name of one, or the beginning of its SHA-256."
        )
    (record,) = found
    taken = {name: record[name] for name in ("shard", "sha256", "files") if name in record}
    document = {**taken, "reason": reason, "by": user(), "time": time.time()}
    registry.create("released", record["sha256"], document)
    return record
