"""The records of what is held: the latest counts, and a person may take it in."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.holding import (
    LotState,
    add_finding,
    describe_drift,
    hashes_of,
    held_shards,
    in_state,
    latest_findings,
    release_shard,
    released,
)
from pipeline.lots import Lot
from pipeline.registry import Registry
from pipeline.scores.drift import Drift
from pipeline.storage import LocalStorage

FAR = Drift(distance=90.0, largest=10.0, limit=15.0, count=300)
X, Y = (Lot(f"{name}.tar", sha256 * 64, ()) for name, sha256 in (("x", "a"), ("y", "b")))
LOOSE = Lot("loose-c", "c" * 64, (), {"1.png": "1" * 64, "2.png": "2" * 64})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(LocalStorage(str(tmp_path)), "m")
    pin(registry)
    return registry


def pin(registry: Registry) -> None:
    registry.add_record("evaluations", registry.evaluations(), {"reference": "r"})


def find(
    registry: Registry, lot: Lot, state: LotState = "held", cycle: int = 1, evaluation: int = 1
) -> None:
    last = latest_findings(registry, before=cycle).get(lot.sha256)
    reason = describe_drift(FAR)
    add_finding(
        registry, lot, state, reason, evaluation=evaluation, cycle=cycle, last=last, drift=FAR
    )


def names(registry: Registry) -> list[str]:
    return [record["shard"] for record in held_shards(registry)]


def test_a_lot_is_held_once_with_the_numbers(registry: Registry) -> None:
    for cycle in (1, 1, 2):
        find(registry, X, cycle=cycle)
    (record,) = registry.records("drift")
    assert record["reason"] == (
        "300 of its items are 90.00 from the reference, and as many random real images are at most "
        "10.00, with retrain.drift_factor 15.00"
    )
    (held,) = held_shards(registry)
    assert (held["shard"], held["sha256"], held["distance"]) == ("x.tar", "a" * 64, 90.0)


def test_of_a_lot_the_latest_finding_counts(registry: Registry) -> None:
    find(registry, X)
    find(registry, Y)
    find(registry, X, "passed", cycle=2)
    assert names(registry) == ["y.tar"]
    before = latest_findings(registry, before=2)
    assert [r["shard"] for r in in_state(registry, before, "held", 1)] == ["x.tar", "y.tar"]
    find(registry, X, cycle=10)
    assert names(registry) == ["x.tar", "y.tar"]


def test_another_evaluation_holds_none_that_it_has_not_seen(registry: Registry) -> None:
    find(registry, X, cycle=7)
    pin(registry)
    assert held_shards(registry) == []
    find(registry, X, cycle=8, evaluation=2)
    assert names(registry) == ["x.tar"]


@pytest.mark.parametrize("which", ["x.tar", "a" * 8, "a" * 64])
def test_a_held_shard_is_released_by_name_or_hash(registry: Registry, which: str) -> None:
    find(registry, X)
    find(registry, Y)
    release_shard(registry, which, "looked at")
    release_shard(registry, which, "again")
    assert released(registry) == {"a" * 64}
    assert names(registry) == ["y.tar"]
    (record,) = registry.records("released")
    assert (record["reason"], bool(record["by"])) == ("looked at", True)


def test_loose_images_are_released_together(registry: Registry) -> None:
    find(registry, LOOSE)
    assert hashes_of(held_shards(registry)) == {"1" * 64, "2" * 64}
    release_shard(registry, "loose-c", "looked at")
    assert released(registry) == {"c" * 64, "1" * 64, "2" * 64}
    assert names(registry) == []


def test_what_is_not_held_is_not_released(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"No held shard is called 'x'\. .* for m: none\."):
        release_shard(registry, "x", "")
    find(registry, X)
    find(registry, Lot("x.tar", "ab" * 32, ()))
    find(registry, Y)
    find(registry, Y, "passed", cycle=2)
    with pytest.raises(ConfigError, match=r"Several held shards are called 'x\.tar'"):
        release_shard(registry, "x.tar", "")
    for which in ("a", "y.tar"):  # too short to be meant; held no more
        with pytest.raises(ConfigError, match=f"No held shard is called '{which}'"):
            release_shard(registry, which, "")
    assert registry.records("released") == []
