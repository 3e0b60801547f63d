import threading
from pathlib import Path

import pytest

from pipeline.registry import Registry, _judge
from pipeline.storage import LocalStorage


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalStorage(str(tmp_path)), "m")


def score(value: float, **protocol: object) -> dict:
    return {"metric": "fid[x]", "value": value, "protocol": {"seed": 0, **protocol}}


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


def test_judges_only_what_is_comparable() -> None:
    champion = {"number": 1, "score": score(10.0)}
    assert _judge(score(20.0), None, 1) == (True, "it is the first version")
    assert _judge(score(9.0), champion, 2)[0]
    assert not _judge(score(11.0), champion, 2)[0]
    assert _judge(score(10.0), champion, 1)[0]
    is_promoted, reason = _judge(score(1.0, eta=1.0), champion, 2)
    assert not is_promoted
    assert "the protocols differ in eta" in reason
