"""Preprocessing on a real Ray: incremental, deterministic, and killed at any moment.

A process of the program costs seconds, so each test tells several things of one story.
"""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage
from pipeline.units import unit_directory

from .conftest import cli_program

NOWHERE = ("--set", "cluster.address=127.0.0.1:1")  # starting or joining Ray would fail

Members = list[tuple[str, bytes]]


class Project:
    """A config over the tar shards of a directory, on the shared cluster."""

    def __init__(
        self,
        directory: Path,
        address: str,
        run_cli: Callable[..., Any],
        plan_cli: Callable[..., Any],
        root: str = "runs",
    ) -> None:
        self.directory, self.run_cli, self.plan_cli = directory, run_cli, plan_cli
        self.config_path = directory / "c.toml"
        self.config_path.write_text(
            f'name = "p"\n[storage]\nroot = "{root}"\n'
            '[data]\nsources = ["in"]\nresolution = 16\nmode = "L"\n'
            "validation_fraction = 0.1\ntest_fraction = 0.1\n"
            f'[cluster]\naddress = "{address}"\n'
        )
        (directory / "in").mkdir()

    def run(self, *options: str, code: int = 0) -> dict[str, Any]:
        """Preprocesses; what it says as JSON, with what it prints as `lines`."""
        done = self.run_cli(
            "preprocess", "c.toml", "--json", *options, cwd=self.directory, timeout=200
        )
        assert done.returncode == code, done.stdout + done.stderr
        return {**json.loads(done.stdout), "lines": done.stderr}

    def plan(self, *options: str) -> dict[str, Any]:
        done = self.plan_cli("plan", "c.toml", "--json", *options, cwd=self.directory)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def units(self) -> dict[str, dict[str, bytes]]:
        """The files of every finished unit, by the name of its input."""
        found = {}
        for path in (self.directory / "runs" / "steps" / "shard").glob("*/manifest.json"):
            files = {p.name: p.read_bytes() for p in path.parent.iterdir()}
            found[json.loads(files["manifest.json"])["input"]] = files
        return found

    def made_at(self) -> dict[str, int]:
        """When the manifest of each finished unit was written, by directory."""
        paths = (self.directory / "runs" / "steps" / "shard").glob("*/manifest.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in paths}

    def expected_units(self) -> dict[str, dict[str, bytes]]:
        """What units must be: made one by one in this process, elsewhere."""
        data = load_config(self.config_path).data
        storage = LocalStorage(str(self.directory / "expected"))
        found = {}
        for shard in list_inputs(data, storage).shards:
            preprocess_shard(shard, data, storage)
            directory = Path(storage.uri, unit_directory(shard, data))
            found[shard.name] = {p.name: p.read_bytes() for p in directory.iterdir()}
        return found

    def check_nothing_lost_or_doubled(self, num_images: int) -> None:
        root = self.directory / "runs"
        units = self.units()
        assert units == self.expected_units()
        assert list(root.rglob(".staged-*")) == []
        counts = [
            sum(split["count"] for split in json.loads(files["manifest.json"])["splits"].values())
            for files in units.values()
        ]
        assert sum(counts) == num_images


@pytest.fixture
def project(
    tmp_path: Path,
    ray_cluster: str,
    run_cli: Callable[..., Any],
    call_cli: Callable[..., Any],
) -> Project:
    return Project(tmp_path, ray_cluster, run_cli, call_cli)


def fill(
    directory: Path,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    *,
    shards: int,
    images: int,
    side: int = 16,
) -> None:
    for k in range(shards):
        members = [(f"{i:03d}.png", make_png(1000 * k + i, (side, side))) for i in range(images)]
        make_tar(directory / f"{k:03d}.tar", members)


def test_only_what_is_new_runs_and_the_plan_says_so(
    project: Project, make_tar: Callable[..., Path], make_png: Callable[..., bytes]
) -> None:
    source = project.directory / "in"
    fill(source, make_tar, make_png, shards=100, images=3)
    assert len(project.plan()["missing_shards"]) == 100
    assert "100 shards (100 new)" in project.run()["lines"]
    made = project.made_at()
    assert project.plan()["missing_shards"] == []
    assert project.plan()["steps"][0]["action"] == "cached"

    make_tar(source / "new.tar", [("a.png", make_png(7))])
    planned = project.plan()
    assert planned["missing_shards"] == ["new.tar"]
    assert planned["steps"][0]["reason"] == (
        "shards changed (1 added); 1 of 101 input shards to do: new.tar"
    )
    assert "101 shards (1 new)" in project.run()["lines"]
    later = project.made_at()
    assert {key: later[key] for key in made} == made
    assert len(later) == 101

    (source / "000.tar").unlink()
    planned = project.plan()
    assert planned["missing_shards"] == []
    assert "shards changed (1 removed); 0 of 100" in planned["steps"][0]["reason"]
    assert "100 shards (0 new)" in project.run(*NOWHERE)["lines"]

    stat = (source / "001.tar").stat()
    make_tar(source / "001.tar", [(f"{i:03d}.png", make_png(5000 + i, (16, 16))) for i in range(3)])
    os.utime(source / "001.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert project.plan()["missing_shards"] == ["001.tar"]
    changed = ("--set", "data.resample=area")
    assert len(project.plan(*changed)["missing_shards"]) == 100
    assert project.made_at() == later


@pytest.mark.slow  # as of the twenty below, but with what the user is told
def test_a_killed_worker_costs_nothing(
    project: Project,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    kill_workers: Callable[[], "WorkerKiller"],
) -> None:
    fill(project.directory / "in", make_tar, make_png, shards=4, images=150, side=192)
    with kill_workers() as killer:
        done = project.run()
    assert killer.killed, "no worker was at work"
    assert "4 shards (4 new)" in done["lines"]
    project.check_nothing_lost_or_doubled(600)


@pytest.mark.slow
def test_a_killed_driver_keeps_every_finished_shard(
    project: Project,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    kill_cli_at: Callable[..., list[str]],
) -> None:
    fill(project.directory / "in", make_tar, make_png, shards=8, images=60, side=192)
    kill_cli_at(
        "preprocess", "c.toml",
        cwd=project.directory, is_time=lambda _: 1 <= len(project.made_at()) <= 6,
    )  # fmt: skip
    made = project.made_at()
    assert 1 <= len(made) < 8
    done = project.run()
    left = re.search(r"8 shards \((\d) new\)", done["lines"])
    assert left is not None
    assert int(left[1]) <= 8 - len(made)
    later = project.made_at()
    assert {key: later[key] for key in made} == made
    project.check_nothing_lost_or_doubled(480)


def test_a_full_disk_is_an_error_and_no_half_shard(
    project: Project,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    small_disk: Callable[[Path, int], None],
) -> None:
    root = project.directory / "runs"
    root.mkdir()
    small_disk(root, 256 << 10)
    fill(project.directory / "in", make_tar, make_png, shards=30, images=40)
    failed = project.run(code=4)
    assert "No space left on device" in failed["error"]
    for files in project.units().values():
        manifest = json.loads(files["manifest.json"])
        names = {file["file"] for file in manifest["files"]} | {manifest["index"]["file"]}
        assert names == files.keys() - {"manifest.json"}
    made = project.made_at()
    assert 0 < len(made) < 30
    small_disk(root, 64 << 20)
    assert re.search(r"30 shards \(\d+ new\)", project.run()["lines"])
    later = project.made_at()
    assert {key: later[key] for key in made} == made
    project.check_nothing_lost_or_doubled(1200)


def test_a_storage_error_in_the_middle_and_a_bucket_that_is_not_read_again(
    tmp_path: Path,
    ray_cluster: str,
    run_cli: Callable[..., Any],
    object_store: Any,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
) -> None:
    store, bucket = object_store
    project = Project(tmp_path, ray_cluster, run_cli, run_cli, root=f"s3://{bucket}/root")
    options = ("--set", f'data.sources=["s3://{bucket}/in/*.tar"]')
    fill(tmp_path / "in", make_tar, make_png, shards=6, images=10)
    for path in sorted((tmp_path / "in").iterdir()):
        store.filesystem.put_file(str(path), f"{bucket}/in/{path.name}")
    store.requests.clear()
    assert len(project.plan(*options)["missing_shards"]) == 6
    assert not [path for path in store.read() if path.endswith(".tar")]

    written: list[str] = []

    def fails(method: str, path: str) -> bool:  # after two units, in the middle of a third
        if method != "PUT" or "/steps/shard/" not in path:
            return False
        written.append(path)
        return sum(name.endswith("manifest.json") for name in written) > 2

    store.fails = fails
    failed = project.run(*options, code=4)
    assert "Cannot write" in failed["error"]
    store.fails = lambda method, path: False
    missing = project.plan(*options)["missing_shards"]
    assert 0 < len(missing) < 6
    assert f"6 shards ({len(missing)} new)" in project.run(*options)["lines"]

    store.requests.clear()
    assert project.plan(*options)["missing_shards"] == []
    assert (
        "Everything was there already"
        in run_cli("preprocess", "c.toml", *options, *NOWHERE, cwd=tmp_path).stdout
    )
    assert not [path for path in store.read() if path.endswith((".tar", ".arrow"))]


def test_too_many_bad_images_fail_and_are_listed(
    project: Project, make_tar: Callable[..., Path], make_png: Callable[..., bytes]
) -> None:
    members: Members = [(f"{k:03d}.png", make_png(k, (16, 16))) for k in range(60)]
    members += [(f"bad{k}.png", make_png(k)[:80]) for k in range(3)] + [("../up.png", make_png(1))]
    make_tar(project.directory / "in" / "a.tar", members)
    failed = project.run(code=3)
    assert "4 of 64 images cannot be used" in failed["error"]
    ledger = re.search(r"listed in (\S+quarantine\.jsonl)", failed["error"])
    assert ledger is not None
    listed = [json.loads(line) for line in Path(ledger[1]).read_text().splitlines()]
    assert {item["source"]: item["reason"] for item in listed} == {
        **{f"a.tar/bad{k}.png": "truncated" for k in range(3)},
        "a.tar/../up.png": "unsafe_name",
    }
    done = project.run("--set", "data.max_bad_fraction=0.1", *NOWHERE)
    metrics = done["metrics"]["preprocess"]
    assert metrics["refused"] == 4
    assert metrics["refused_by_reason"]["unsafe_name"] == 1


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_every_time_is_named(
    project: Project,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    kill_workers: Callable[..., "WorkerKiller"],
) -> None:
    fill(project.directory / "in", make_tar, make_png, shards=1, images=400, side=192)
    with kill_workers(1 << 10) as killer:
        failed = project.run(code=7)
    assert len(killer.killed) >= 4
    assert "The shards at work were among 000.tar" in failed["error"]
    assert "1 shards (1 new)" in project.run()["lines"]
    project.check_nothing_lost_or_doubled(400)


@pytest.mark.slow  # minutes
def test_twenty_kills(
    project: Project,
    make_tar: Callable[..., Path],
    make_png: Callable[..., bytes],
    kill_workers: Callable[[], "WorkerKiller"],
) -> None:
    fill(project.directory / "in", make_tar, make_png, shards=30, images=40, side=192)
    rng = np.random.default_rng(0)
    expected = project.expected_units()
    killed = {"driver": 0, "worker": 0}
    seen: dict[str, int] = {}
    attempt, is_done = 0, False
    while sum(killed.values()) < 20:
        attempt += 1
        assert attempt < 100, killed
        if is_done or attempt % 5 == 0:  # from the start again, elsewhere
            changed = 0.5 + attempt / 1000
            text = project.config_path.read_text()
            text = re.sub(r"max_bad_fraction.*\n", "", text)
            project.config_path.write_text(
                text.replace("[cluster]", f"max_bad_fraction = {changed}\n[cluster]")
            )
            for path in sorted((project.directory / "runs" / "steps" / "shard").glob("*")):
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
            seen = {}
        process = subprocess.Popen(
            [cli_program(), "preprocess", "c.toml"],
            cwd=project.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with kill_workers() as killer:
            try:
                process.wait(timeout=float(rng.uniform(2.5, 6.0)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed["driver"] += 1
        killed["worker"] += len(killer.killed)
        is_done = process.returncode == 0  # on a fast machine before its time
        made = project.made_at()
        assert {key: made[key] for key in seen} == seen
        seen = made
        for name, files in project.units().items():
            assert files == expected[name]
    project.run()
    project.check_nothing_lost_or_doubled(1200)


class WorkerKiller:
    """Kills workers of Ray while they preprocess, up to a number."""

    def __init__(self, most: int = 1) -> None:
        self.most, self.killed = most, list[int]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "WorkerKiller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02) and len(self.killed) < self.most:
            for pid in _busy_workers():
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
                break


def _busy_workers() -> list[int]:
    """The workers of this test run's cluster that run a task of Ray Data just now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::"):
                title = (entry / "cmdline").read_text()
                is_ours = os.environ["RAY_AUTH_TOKEN"].encode() in (entry / "environ").read_bytes()
                if is_ours and "_run_task" in title:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def kill_workers(ray_cluster: str) -> Callable[..., WorkerKiller]:
    return WorkerKiller
