"""A Ray of its own: started for what has to run, and gone afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import cluster

MARK = "RAYDIFFUSION_TEST_MARK"


def marked(mark: str) -> list[str]:
    """The processes that inherited a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.fixture
def short_temp() -> Iterator[Path]:
    """A directory for temporary files whose path is short: Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_leaves_no_process_and_no_directory_behind(
    tiny_config: Path, short_temp: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    mark = uuid.uuid4().hex
    # A package of our name where the user stands must not reach the workers.
    (tiny_config.parent / "pipeline").mkdir()
    (tiny_config.parent / "pipeline" / "__init__.py").write_text("raise RuntimeError('not ours')")
    # Where the config says nothing, an address in the environment must not decide.
    env = {MARK: mark, "TMPDIR": str(short_temp), "RAY_ADDRESS": "127.0.0.1:1"}
    done = run_cli(
        "preprocess", str(tiny_config), "--set", "cluster.num_cpus=1", "--json",
        cwd=tiny_config.parent, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["metrics"]["preprocess"]["counts"]["train"] == 952
    assert marked(mark) == []
    assert os.listdir(short_temp) == []


def test_clears_up_after_a_killed_one(short_temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_temp))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=30)
    for pid in (dead.pid, os.getpid()):
        (short_temp / f"{cluster._temp_prefix(pid)}x").mkdir()
    (short_temp / "rd-another-1-x").mkdir()
    cluster.remove_stale_directories()
    left = {path.name for path in short_temp.iterdir()}
    assert left == {f"{cluster._temp_prefix(os.getpid())}x", "rd-another-1-x"}


@pytest.mark.slow  # each starts a Ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_its_processes_end_with_an_interrupted_or_killed_driver(
    tiny_config: Path, short_temp: Path, number: signal.Signals
) -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "raydiffusion"), "preprocess", str(tiny_config)],
        cwd=tiny_config.parent,
        env={**os.environ, MARK: mark, "TMPDIR": str(short_temp), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("preprocess 0 of 4"):
            assert len(marked(mark)) > 3
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -9), errors
    if number == signal.SIGINT:  # it ends them itself
        assert os.listdir(short_temp) == []
    deadline = time.monotonic() + (20 if number == signal.SIGINT else 180)
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(mark) == []
