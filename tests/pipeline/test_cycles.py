"""The records of `retrain`, and that two do not retrain one model at once."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from pipeline.cycles import (
    begin_cycle,
    end_cycle,
    held_shards,
    hold_cycle,
    hold_shard,
    last_cycle,
    release_shard,
    released,
)
from pipeline.errors import BusyError, ConfigError
from pipeline.identities import InputFile
from pipeline.registry import Registry
from pipeline.scores.drift import Drift
from pipeline.sources import InputShard
from pipeline.storage import LocalStorage

FAR = Drift(distance=90.0, largest=10.0, limit=15.0, count=300)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalStorage(str(tmp_path)), "m")


def shard(name: str, sha256: str) -> InputShard:
    file = InputFile(name, f"/{name}", num_bytes=1, identity=None, sha256=sha256)
    return InputShard(name, "tar", (file,))


def pin(registry: Registry) -> None:
    registry.add_record("evaluations", registry.evaluations(), {"reference": "r"})


def test_the_latest_cycle_counts_and_knows_whether_it_is_over(registry: Registry) -> None:
    assert last_cycle(registry) is None
    first = begin_cycle(registry, {"key": "a"})
    found = last_cycle(registry)
    assert found is not None
    assert (found["number"], found["key"], found["outcome"]) == (1, "a", None)
    end_cycle(registry, first["number"], {"state": "kept"})
    end_cycle(registry, first["number"], {"state": "another"})  # what is recorded stays
    found = last_cycle(registry)
    assert found is not None
    assert found["outcome"]["state"] == "kept"
    begin_cycle(registry, {"key": "b"})
    found = last_cycle(registry)
    assert found is not None
    assert (found["number"], found["outcome"]) == (2, None)


def test_a_shard_is_held_once_with_the_numbers(registry: Registry) -> None:
    pin(registry)
    for _ in range(2):
        record = hold_shard(registry, shard("x.tar", "a" * 64), 1, FAR)
    assert record["reason"] == (
        "300 of its items are 90.00 from the reference, and as many random real images are at most "
        "10.00, with retrain.drift_factor 15.00"
    )
    (held,) = held_shards(registry)
    assert (held["shard"], held["sha256"], held["distance"]) == ("x.tar", "a" * 64, 90.0)


def test_another_evaluation_holds_none_that_it_has_not_seen(registry: Registry) -> None:
    pin(registry)
    hold_shard(registry, shard("x.tar", "a" * 64), 1, FAR)
    pin(registry)
    assert held_shards(registry) == []


@pytest.mark.parametrize("which", ["x.tar", "a" * 8, "a" * 64])
def test_a_held_shard_is_released_by_name_or_hash(registry: Registry, which: str) -> None:
    pin(registry)
    hold_shard(registry, shard("x.tar", "a" * 64), 1, FAR)
    hold_shard(registry, shard("y.tar", "b" * 64), 1, FAR)
    release_shard(registry, which, "looked at")
    release_shard(registry, which, "again")
    assert released(registry) == {"a" * 64}
    assert [record["shard"] for record in held_shards(registry)] == ["y.tar"]
    (record,) = registry.records("released")
    assert (record["reason"], bool(record["by"])) == ("looked at", True)


def test_what_is_not_held_is_not_released(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"No held shard is called 'x'\. .* for m: none\."):
        release_shard(registry, "x", "")
    pin(registry)
    for sha256 in ("a" * 64, "ab" * 32):
        hold_shard(registry, shard("x.tar", sha256), 1, FAR)
    with pytest.raises(ConfigError, match=r"Several held shards are called 'x\.tar'"):
        release_shard(registry, "x.tar", "")
    with pytest.raises(ConfigError, match="No held shard is called 'a'"):  # too short to be meant
        release_shard(registry, "a", "")
    assert registry.records("released") == []


def wait_inside(root: str, is_in: Any, may_leave: Any) -> None:
    """In a process of its own: retrains until told to leave."""
    with hold_cycle(Registry(LocalStorage(root), "m")):
        is_in.set()
        may_leave.wait(timeout=60)


def test_of_two_at_once_one_is_told(registry: Registry, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_in, may_leave = context.Event(), context.Event()
    process = context.Process(target=wait_inside, args=(str(tmp_path), is_in, may_leave))
    process.start()
    assert is_in.wait(timeout=60)
    message = rf"Process {process.pid} on \S+ retrains m, or pins another reference for it, already"
    with pytest.raises(BusyError, match=message), hold_cycle(registry):
        pass
    may_leave.set()
    process.join()
    with hold_cycle(registry):
        pass


def test_who_was_killed_holds_nobody_up(registry: Registry, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_in, may_leave = context.Event(), context.Event()
    process = context.Process(target=wait_inside, args=(str(tmp_path), is_in, may_leave))
    process.start()
    assert is_in.wait(timeout=60)
    process.kill()
    process.join()
    with hold_cycle(registry):
        pass
