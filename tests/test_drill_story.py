"""Drills as a user runs them, each on a Ray of its own that it leaves nothing of."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.processes import find_processes

from .conftest import cli_program

STEPS = ("--steps", "1000")
MARK = "RAYDIFFUSION_TEST_MARK"


@pytest.fixture
def short_temp() -> Iterator[Path]:
    """A directory for temporary files whose path is short: Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def drill(
    tiny_config: Path, short_temp: Path, run_cli: Callable[..., Any]
) -> Callable[..., dict[str, Any]]:
    """Runs a drill; what it says, once nothing of it is left."""

    def run(kind: str, *options: str, code: int = 0) -> dict[str, Any]:
        mark = uuid.uuid4().hex
        done = run_cli(
            "drill", str(tiny_config), "--kill", kind, "--json", *STEPS, *options,
            cwd=tiny_config.parent, env={MARK: mark, "TMPDIR": str(short_temp)}, timeout=900,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert find_processes(mark) == []
        assert os.listdir(short_temp) == []
        assert [path.name for path in tiny_config.parent.iterdir()] == [tiny_config.name]
        return json.loads(done.stdout)

    return run


def assert_recovered(found: dict[str, Any]) -> None:
    assert found["ended_well"]
    assert found["error"] is None
    assert found["num_steps"] == 1000
    assert found["checkpoint_every"] == 100
    assert 550 <= found["struck_at_step"] < 1000
    assert found["seconds_to_recover"] > 0


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_checkpoint(
    drill: Callable[..., dict[str, Any]],
) -> None:
    found = drill("worker")
    assert_recovered(found)
    assert found["resumed_from"] % 100 == 0
    assert found["resumed_from"] >= 300
    assert found["steps_lost"] == found["struck_at_step"] - found["resumed_from"]
    assert (found["workers_before"], found["workers_after"]) == (2, 2)


@pytest.mark.slow
def test_a_killed_driver_is_started_again_and_goes_on(
    drill: Callable[..., dict[str, Any]],
) -> None:
    found = drill("driver")
    assert_recovered(found)
    assert found["steps_lost"] == found["struck_at_step"] - found["resumed_from"]
    assert found["resumed_from"] >= 300


@pytest.mark.slow
def test_a_lost_node_leaves_one_worker_that_goes_on(drill: Callable[..., dict[str, Any]]) -> None:
    found = drill("node")
    assert_recovered(found)
    assert (found["workers_before"], found["workers_after"]) == (2, 1)
    assert found["resumed_from"] >= 300


@pytest.mark.slow
def test_storage_that_goes_away_costs_no_step(drill: Callable[..., dict[str, Any]]) -> None:
    found = drill("storage", "--outage", "5")
    assert_recovered(found)
    assert found["resumed_from"] is None
    assert found["steps_lost"] == 0
    assert found["seconds_to_recover"] > 5


@pytest.mark.slow
def test_a_drill_that_does_not_recover_ends_as_its_training(
    drill: Callable[..., dict[str, Any]],
) -> None:
    found = drill("worker", "--set", "train.max_failures=0", code=5)
    assert not found["ended_well"]
    assert "its retries are used up" in found["error"]
    assert found["seconds_to_recover"] is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_drill_leaves_nothing(
    tiny_config: Path, short_temp: Path, number: signal.Signals
) -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [cli_program(), "drill", str(tiny_config), "--kill", "worker", *STEPS],
        cwd=tiny_config.parent,
        env={**os.environ, MARK: mark, "TMPDIR": str(short_temp)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(find_processes(mark)) < 6 and time.monotonic() < deadline:  # its Ray is there
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130, errors
    assert "Nothing of the drill is left" in errors
    assert find_processes(mark) == []
    assert os.listdir(short_temp) == []
