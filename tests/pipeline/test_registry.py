import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.cycles import begin_cycle, end_cycle, last_cycle
from pipeline.errors import BusyError, ConfigError, StorageError
from pipeline.registry import Registry, line_of_champions, list_models, open_registry
from pipeline.storage import LocalStorage, open_storage


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalStorage(str(tmp_path)), "m")


def test_versions_are_numbered_and_found_again(registry: Registry) -> None:
    assert registry.add_version({"key": "a"})["number"] == 1
    assert registry.add_version({"key": "b"})["number"] == 2
    assert registry.add_version({"key": "a"})["number"] == 1
    assert [v["key"] for v in registry.versions()] == ["a", "b"]


def test_the_champion_is_the_last_promotion(registry: Registry) -> None:
    assert registry.champion() is None
    for key in "ab":
        registry.add_version({"key": key})
    registry.promote(1, "first")
    registry.promote(2, "better")
    registry.promote(2, "again")
    registry.promote(1, "back")
    champion = registry.champion()
    assert champion is not None
    assert champion["key"] == "a"
    assert [p["version"] for p in registry.promotions()] == [1, 2, 1]
    assert all(p["by"] and p["reason"] and p["time"] for p in registry.promotions())


def test_many_at_once_lose_nothing(registry: Registry) -> None:
    threads = [
        threading.Thread(target=registry.add_version, args=({"key": str(k)},)) for k in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [v["number"] for v in registry.versions()] == list(range(1, 13))
    assert {v["key"] for v in registry.versions()} == {str(k) for k in range(12)}


def test_a_rollback_goes_back_along_the_line_and_never_forward(registry: Registry) -> None:
    for key in "abcd":
        registry.add_version({"key": key})
    with pytest.raises(ConfigError, match=r"no champion to go back to: it is none\."):
        registry.rollback()
    registry.promote(1, "first")
    with pytest.raises(ConfigError, match="it is version 1, its first"):
        registry.rollback()
    registry.promote(2, "better")
    registry.promote(3, "better still")
    back = registry.rollback("bad eyes")
    assert (back["number"], back["version"], back["replaces"]) == (4, 2, 3)
    assert (back["kind"], back["reason"]) == ("rollback", "bad eyes")
    assert registry.rollback()["version"] == 1  # not 3 again
    assert registry.promotions()[-1]["reason"] == "version 2 rolled back"
    with pytest.raises(ConfigError, match="it is version 1, its first"):
        registry.rollback()
    registry.promote(4, "best")
    assert registry.rollback()["version"] == 1
    assert line_of_champions(registry.promotions()) == [1]
    assert [p["version"] for p in registry.promotions()] == [1, 2, 3, 2, 1, 4, 1]


def test_a_promotion_decided_upon_what_is_over_is_told(registry: Registry) -> None:
    for key in "abc":
        registry.add_version({"key": key})
    first = registry.promote(1, "first", after=0)
    registry.promote(2, "better", after=first["number"])
    with pytest.raises(BusyError, match=r"Version 2 of m was promoted meanwhile by .+ \(better\)"):
        registry.promote(3, "I saw version 1", after=first["number"])
    assert registry.promote(2, "so did I", after=first["number"])["reason"] == "better"
    assert len(registry.promotions()) == 2


def test_only_versions_that_are_there_are_promoted(registry: Registry) -> None:
    registry.add_version({"key": "a"})
    with pytest.raises(ConfigError, match=r"has no version 2\. The latest there: 1\."):
        registry.promote(2, "")
    assert registry.promotions() == []


def test_models_are_found_by_name(registry: Registry) -> None:
    registry.storage.create("models/empty/lease", b"")
    with pytest.raises(ConfigError, match=r"no model 'm' below .*Those there: none"):
        open_registry(registry.storage, "m")
    registry.add_version({"key": "a"})
    assert list_models(registry.storage) == ["m"]
    assert open_registry(registry.storage, "m").versions()[0]["key"] == "a"


def test_a_damaged_record_is_named(registry: Registry, tmp_path: Path) -> None:
    registry.add_version({"key": "a"})
    (tmp_path / "models/m/versions/000001.json").write_text("{")
    with pytest.raises(StorageError, match=r"models/m/versions/000001\.json is missing or no JSON"):
        registry.versions()


def race(root: str, version: int, barrier: Any, told: Any) -> None:
    """In a process of its own: promotes when the other does."""
    registry = Registry(open_storage(root), "m")
    after = registry.promotions()[-1]["number"]
    barrier.wait(timeout=60)
    try:
        told.put((version, registry.promote(version, f"by {version}", after=after)["number"]))
    except BusyError as error:
        told.put((version, str(error)))


@pytest.mark.parametrize("place", ["directory", "object store"])
def test_of_two_promotions_at_once_one_is_made_and_the_other_told(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path)
    if place == "object store":
        root = f"s3://{request.getfixturevalue('object_store')[1]}/r"
    registry = Registry(open_storage(root), "m")
    for key in "abc":
        registry.add_version({"key": key})
    registry.promote(1, "first")
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=race, args=(root, version, barrier, told)) for version in (2, 3)
    ]
    for process in processes:
        process.start()
    answers = dict(told.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    (winner,) = [version for version, answer in answers.items() if answer == 2]
    (loser,) = answers.keys() - {winner}
    assert answers[loser].startswith(f"Version {winner} of m was promoted meanwhile by ")
    assert f"and version {loser} was not" in answers[loser]
    assert [p["version"] for p in registry.promotions()] == [1, winner]


def test_what_the_last_record_says_is_read_from_it_alone(object_store: Any) -> None:
    store, bucket = object_store
    registry = Registry(open_storage(f"s3://{bucket}/r"), "m")
    for k in range(6):
        registry.add_version({"key": str(k)})
        registry.promote(k + 1, "better")
        cycle = begin_cycle(registry, {"key": str(k)})
        end_cycle(registry, cycle["number"], {"state": "kept"})
    store.requests.clear()
    champion, last = registry.champion(), last_cycle(registry)
    assert champion is not None
    assert last is not None
    assert (champion["key"], last["key"], last["outcome"]["state"]) == ("5", "5", "kept")
    kinds = ("promotions", "versions", "cycles", "outcomes")
    assert sorted(store.read()) == sorted(f"/{bucket}/r/models/m/{k}/000006.json" for k in kinds)


class Together(LocalStorage):
    """A root that gives nothing until two ask."""

    def read(self, path: str) -> bytes:
        asked.wait(timeout=60)
        return super().read(path)


asked = threading.Barrier(2)


def test_records_are_read_side_by_side(registry: Registry) -> None:
    for key in "abcd":
        registry.add_version({"key": key})
    found = Registry(Together(registry.storage.uri), "m").versions()
    assert [version["key"] for version in found] == list("abcd")
