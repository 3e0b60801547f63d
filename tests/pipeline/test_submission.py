import json
import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster_jobs import Job, Status
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.packing import make_package
from pipeline.submission import (
    Submission,
    attempt_of,
    make_submission,
    settings_on_cluster,
    submit_or_find,
)

HEAD = "http://head:8265"


class Cluster:
    """Keeps jobs as Ray does: an id is created once."""

    address = HEAD

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self._lock = threading.Lock()
        self.before_submit: Any = lambda job_id: None

    def jobs(self) -> list[Job]:
        return list(self.known.values())

    def submit(
        self, job_id: str, *, entrypoint: str, directory: Path, metadata: Mapping[str, str]
    ) -> bool:
        assert (directory / "pipeline" / "submission.py").is_file()
        self.before_submit(job_id)
        with self._lock:
            if job_id in self.known:
                return False
            self.set(job_id, "PENDING")
            return True

    def set(self, job_id: str, status: Status) -> None:
        self.known[job_id] = Job(job_id, status, "", "", None, None, None, {})


def submission(path: Path, *overrides: str, verb: str = "run", **options: Any) -> Submission:
    config = load_config(path, overrides)
    arguments = [word for text in overrides for word in ("--set", text)]
    given = {"submitted_as": f"submit run {path.name}"} | options
    return make_submission(config, make_package(config, path), verb, arguments=arguments, **given)


def settings(path: Path, *overrides: str, is_here: bool, shares: bool = False) -> list[str]:
    config = load_config(path, overrides)
    package = make_package(config, path)
    return settings_on_cluster(config, package, address=HEAD, is_here=is_here, shares_paths=shares)


def test_the_name_follows_from_verb_config_code_and_overrides(tiny_config: Path) -> None:
    first = submission(tiny_config)
    assert first.name.startswith("tiny-run-")
    assert submission(tiny_config).name == first.name
    assert submission(tiny_config, submitted_as="submit run ../tiny.toml").name == first.name
    others = [
        submission(tiny_config, verb="train"),
        submission(tiny_config, "train.num_steps=7"),
        submission(tiny_config, settings=["storage.root=/x"]),
    ]
    tiny_config.write_text(tiny_config.read_text() + "# other\n")
    others.append(submission(tiny_config))
    assert len({first.name, *(other.name for other in others)}) == 5


def test_the_job_runs_the_verb_on_the_cluster_that_it_is_on(tiny_config: Path) -> None:
    made = submission(tiny_config, "storage.root=a b", settings=["storage.root=/r s"], python="py")
    words = shlex.split(made.entrypoint)
    assert words == [
        "exec", "env", "RAYDIFFUSION_SUBMITTED_AS=submit run tiny.toml",
        "py", "-m", "jobs", "run", "tiny.toml", "--set", "storage.root=a b", "--set",
        "storage.root=/r s", "--set", "cluster.address=$RAY_ADDRESS",
    ]  # fmt: skip
    assert made.entrypoint.endswith('"$RAY_ADDRESS"')


def test_the_same_while_it_runs_is_found_and_afterwards_tried_anew(tiny_config: Path) -> None:
    cluster, wanted = Cluster(), submission(tiny_config)
    first = f"{wanted.name}-1"
    cluster.set(f"{wanted.name}x-9", "RUNNING")  # of another
    assert submit_or_find(cluster, wanted) == (first, True)
    assert submit_or_find(cluster, wanted) == (first, False)
    cluster.set(first, "RUNNING")
    assert submit_or_find(cluster, wanted) == (first, False)
    for number, status in enumerate(("SUCCEEDED", "FAILED", "STOPPED"), start=1):
        cluster.set(f"{wanted.name}-{number}", status)
        assert submit_or_find(cluster, wanted) == (f"{wanted.name}-{number + 1}", True)


def test_of_two_that_submit_at_once_both_get_the_one_job(tiny_config: Path) -> None:
    cluster, wanted = Cluster(), submission(tiny_config)
    both = threading.Barrier(2)
    cluster.before_submit = lambda job_id: both.wait(timeout=30)
    found: list[tuple[str, bool]] = []
    threads = [
        threading.Thread(target=lambda: found.append(submit_or_find(cluster, wanted)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(f"{wanted.name}-1", False), (f"{wanted.name}-1", True)]


def test_attempts_are_counted_of_their_own_name_alone() -> None:
    assert attempt_of("a-run-1-12", "a-run-1") == 12
    assert attempt_of("a-run-1-12", "a-run") is None
    assert attempt_of("a-run-1-x", "a-run-1") is None


def test_paths_of_this_machine_are_made_whole_for_a_cluster_that_is_here(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root, sources = settings(tiny_config, 'data.sources=["ä [1].tar"]', is_here=True)
    assert root == f"storage.root={tmp_path / 'runs'}"
    key, _, value = sources.partition("=")
    assert (key, json.loads(value)) == ("data.sources", [f"{tmp_path}/ä [1].tar"])
    again = load_config(tiny_config, [root, sources])  # they read as they were meant
    assert again.data.sources == (f"{tmp_path}/ä [1].tar",)


def test_paths_of_this_machine_are_refused_by_a_cluster_elsewhere(tiny_config: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(tiny_config, is_here=False)
    text = str(refused.value)
    assert "storage.root = " in text
    assert "data.sources = " in text
    assert f"paths of this machine, and the cluster at {HEAD}" in text
    assert "--shared-paths" in text
    shared = settings(tiny_config, is_here=False, shares=True)
    assert [setting.partition("=")[0] for setting in shared] == ["storage.root", "data.sources"]
    remote = ["storage.root=s3://b/runs", 'data.sources=["s3://b/*.tar"]']
    assert settings(tiny_config, *remote, is_here=False) == []
    with pytest.raises(ConfigError, match=r"^storage\.root = .* is a path of this machine"):
        settings(tiny_config, remote[1], is_here=False)
    with pytest.raises(ConfigError, match="file:///x is a path of this machine"):
        settings(tiny_config, remote[0], 'data.sources=["file:///x"]', is_here=False)
