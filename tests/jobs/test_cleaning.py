"""The verb `gc`: what is printed, and the exit codes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.leases import hold_lease
from pipeline.storage import LocalStorage

KEY = "0123456789abcdef" * 2


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A root with a result that nothing reaches, ten days old, and a new one."""
    storage = LocalStorage(str(tmp_path / "runs"))
    for key, size in ((KEY, 1500), (KEY[::-1], 10)):
        storage.create(f"steps/evaluate/{key}/manifest.json", b"{}")
        storage.create(f"steps/evaluate/{key}/score.json", b"x" * size)
    then = time.time() - 10 * 86_400
    for path in (tmp_path / "runs" / "steps" / "evaluate" / KEY).iterdir():
        os.utime(path, (then, then))
    return tmp_path / "runs"


def test_says_what_would_go_then_deletes_it(
    runs: Path, tmp_path: Path, call_cli: Callable[..., Any]
) -> None:
    said = call_cli("gc", "--dry-run", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[0].split() == ["would", "be", "deleted", "number", "size"]
    assert f"  steps/evaluate/{KEY}  1.5 KiB, last written " in said.stdout
    assert (runs / "steps" / "evaluate" / KEY).exists()
    done = call_cli("gc", cwd=tmp_path)
    assert "steps/evaluate" in done.stdout
    assert "stays: " in done.stdout
    assert not (runs / "steps" / "evaluate" / KEY).exists()
    assert (runs / "steps" / "evaluate" / KEY[::-1]).exists()
    assert "There is nothing to delete below" in call_cli("gc", str(runs), cwd=tmp_path).stdout


def test_the_same_as_json_and_with_less_grace(
    runs: Path, tiny_config: Path, tmp_path: Path, call_cli: Callable[..., Any]
) -> None:
    options = (str(tiny_config), "--grace-days", "0", "--keep-runs", "0", "--json")
    found = json.loads(call_cli("gc", *options, cwd=tmp_path).stdout)
    assert found["root"] == str(runs)
    assert found["dry_run"] is False
    assert (found["deleted"]["count"], found["deleted"]["bytes"]) == (2, 1514)
    assert {item["path"] for item in found["deleted"]["items"]} == {
        f"steps/evaluate/{key}" for key in (KEY, KEY[::-1])
    }
    assert list((runs / "steps" / "evaluate").iterdir()) == []


def test_refusals(runs: Path, tmp_path: Path, call_cli: Callable[..., Any]) -> None:
    elsewhere = call_cli("gc", "elsewhere", cwd=tmp_path)
    assert (elsewhere.returncode, "There is no storage root at" in elsewhere.stderr) == (2, True)
    with hold_lease(LocalStorage(str(runs)), "garbage"):
        busy = call_cli("gc", cwd=tmp_path)
    assert (busy.returncode, "cleans up" in busy.stderr) == (8, True)
    assert (runs / "steps" / "evaluate" / KEY).exists()
