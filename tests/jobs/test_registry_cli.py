"""The verbs of the registry: what is printed, and the exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.registry import Registry
from pipeline.storage import LocalStorage


def document(key: str, value: float, **fields: Any) -> dict[str, Any]:
    protocol = {"num_samples": 500, "reference_count": 300, "reference_split": "test"}
    return {
        "key": key,
        "created": 1.0,
        "score": {"metric": "fid[x]", "value": value, "protocol": protocol},
        "lineage": {"preprocess": "p" * 8, "train": "t" * 8, "evaluate": "e" * 8},
        "weights": "w" * 8,
        "checkpoint": {"series": "s", "global_step": 1000, "images_seen": 1},
        "parent": None,
        "config": {},
        "code": {"version": "0.1.0", "sha256": "c" * 12, "commit": None, "steps": {}},
        **fields,
    }


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(LocalStorage(str(tmp_path / "runs")), "m")
    registry.add_version(document("a", 12.5))
    longer = {"series": "s", "global_step": 2000, "images_seen": 2}
    registry.add_version(document("b", 9.25, parent=1, checkpoint=longer))
    registry.promote(1, "the first")
    return registry


def test_promoting_rolling_back_and_looking(
    registry: Registry, tmp_path: Path, call_cli: Callable[..., Any]
) -> None:
    promoted = call_cli("promote", "m", "2", "--reason", "sharper", cwd=tmp_path)
    assert promoted.returncode == 0, promoted.stderr
    assert "version 2 is the champion of m (promotion 2 by " in promoted.stdout
    first = registry.promotions()[0]
    assert f"it replaces version 1, promoted by {first['by']} at " in promoted.stdout
    assert promoted.stdout.rstrip().endswith(": the first")
    listed = call_cli("models", cwd=tmp_path).stdout.splitlines()
    assert listed[1].split()[:5] == ["m", "2", "2", "fid[x]", "9.250"]
    shown = call_cli("lineage", "m", cwd=tmp_path).stdout
    assert "version    2 of m" in shown
    assert "steps/preprocess/pppppppp" in shown
    assert "continues  version 1 (1,000 steps)" in shown
    assert ": sharper" in shown
    back = call_cli("rollback", "m", "--reason", "too sharp", "--json", cwd=tmp_path)
    record = json.loads(back.stdout)
    assert (record["version"], record["kind"], record["reason"]) == (1, "rollback", "too sharp")
    assert record["replaced"] == registry.promotions()[1]
    versions = call_cli("models", "m", cwd=tmp_path).stdout
    assert "1 *" in versions
    assert "rolled back to version 1: too sharp" in versions
    again = call_cli("rollback", "m", cwd=tmp_path)
    assert (again.returncode, "no champion to go back to" in again.stderr) == (2, True)


def test_a_promotion_after_another_one_is_refused_where_it_says_so(
    registry: Registry, tmp_path: Path, call_cli: Callable[..., Any]
) -> None:
    registry.add_version(document("c", 8.0))
    registry.promote(2, "hers")  # while he looks at version 1
    his = ("promote", "m", "3", "--reason", "his", "--after")
    refused = call_cli(*his, "1", cwd=tmp_path)
    assert refused.returncode == 8
    assert "Version 2 of m was promoted meanwhile by " in refused.stderr
    assert "(hers), and version 3 was not" in refused.stderr
    made = call_cli(*his, "2", "--json", cwd=tmp_path)
    record = json.loads(made.stdout)
    assert (record["version"], record["replaces"], record["replaced"]["reason"]) == (3, 2, "hers")
    again = call_cli(*his, "2", cwd=tmp_path)  # what is so already is no fault
    assert (again.returncode, len(registry.promotions())) == (0, 3)


def test_nothing_comes_after_a_champion_that_there_is_not(tmp_path: Path) -> None:
    registry = Registry(LocalStorage(str(tmp_path / "runs")), "n")
    registry.add_version(document("a", 12.5))
    with pytest.raises(ConfigError, match="The model n has no champion"):
        registry.promote(1, "x", replacing=1)
    assert registry.replaced(registry.promote(1, "x")) is None


def test_the_registry_as_json(
    registry: Registry, tmp_path: Path, call_cli: Callable[..., Any]
) -> None:
    root = str(tmp_path / "runs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    listed = json.loads(call_cli("models", "--root", root, "--json", cwd=elsewhere).stdout)
    (model,) = listed["models"]
    assert (model["name"], model["versions"], model["champion"]["number"]) == ("m", 2, 1)
    lineage = call_cli("lineage", "m", "2", "--root", root, "--json", cwd=elsewhere)
    found = json.loads(lineage.stdout)
    assert found["version"]["number"] == 2
    assert [v["number"] for v in found["ancestors"]] == [1]
    assert found["promotions"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("promote", "m", "7", "--reason", "x"), "has no version 7. The latest there: 1, 2."),
        (("lineage", "n"), "There is no model 'n' below "),
        (("promote", "m", "2"), "Missing option '--reason'"),
    ],
)
def test_what_is_not_there_is_said(
    registry: Registry,
    tmp_path: Path,
    call_cli: Callable[..., Any],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    done = call_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
