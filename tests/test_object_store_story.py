"""The life of a model whose images and storage root are in a bucket, on a cluster of two nodes.

The nodes have nothing in common but the bucket: directories, temporary files and shard caches are
their own, and so are those of the processes that command them.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry import Registry
from pipeline.storage import open_storage

from .clusters import Head, ray_head_in, ray_node_in, short_directory
from .conftest import DIGITS, TINY

TIMEOUT_S = 600
NOWHERE = ("--set", "cluster.address=127.0.0.1:1")  # no Ray is there: joining it would fail
SECTIONS = """
[storage]
root = "{root}"
[cluster]
address = "{address}"
[retrain]
num_steps = 100
[promote]
rule = "not_worse"   # a challenger of this size would be kept as often as promoted
tolerance = 0.5
[tune]
num_trials = 2
num_samples = 64
num_steps = 4
num_finalists = 1
num_seeds = 2
train_steps = 30
stopping = "none"
[tune.space]
schedule = ["linear", "cosine"]
"""
# Prints the names of all tasks and calls of actors, each with the node that it ran on.
PLACES = """
import json, sys
from ray.util.state import list_tasks
tasks = list_tasks(sys.argv[1], detail=True, limit=10_000, raise_on_missing_output=False)
print(json.dumps([(task.name, task.node_id) for task in tasks if task.node_id]))
"""


@dataclass(frozen=True)
class Nodes:
    """A head without CPUs and two nodes of one CPU, each with a directory of its own."""

    head: Head
    directories: tuple[Path, Path]

    def of(self, name: str) -> set[str]:
        """The nodes on which tasks ran whose names hold this one."""
        done = subprocess.run(
            [sys.executable, "-c", PLACES, self.head.address],
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return {node for task, node in json.loads(done.stdout.splitlines()[-1]) if name in task}


@pytest.fixture(scope="module")
def ray_nodes(_object_store: Any) -> Iterator[Nodes]:
    """The cluster, and its token in the environment."""
    with ExitStack() as stack:
        temp = stack.enter_context(short_directory())

        def begin(name: str) -> tuple[Path, dict[str, str]]:
            for part in ("tmp", "cache"):
                (temp / name / part).mkdir(parents=True)
            cache, tmp = str(temp / name / "cache"), str(temp / name / "tmp")
            return temp / name, {"RAYDIFFUSION_CACHE": cache, "TMPDIR": tmp}

        head = stack.enter_context(ray_head_in(*begin("head"), num_cpus=0))
        for name in ("a", "b"):
            stack.enter_context(ray_node_in(*begin(name), head, num_cpus=1))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, head.environment[name])
        yield Nodes(head, (temp / "a", temp / "b"))


class Story:
    """A bucket of shards that grows, and a model that lives beside them."""

    def __init__(self, directory: Path, nodes: Nodes, object_store: Any, run_cli: Any) -> None:
        self.directory, self.nodes, self.run_cli = directory, nodes, run_cli
        self.store, self.bucket = object_store
        self.root = f"s3://{self.bucket}/some/runs"
        self.storage = open_storage(self.root)
        self.registry = Registry(self.storage, "tiny")
        for path in sorted(DIGITS.glob("digits-*.tar")):
            self.put(path)
        text = TINY.format(sources=f"s3://{self.bucket}/shards/*.tar")
        text += SECTIONS.format(root=self.root, address=nodes.head.cluster)
        (directory / "tiny.toml").write_text(text)

    def put(self, shard: Path) -> None:
        self.store.filesystem.pipe_file(f"{self.bucket}/shards/{shard.name}", shard.read_bytes())

    def do(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = self.run_cli(*arguments, cwd=self.directory, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def get(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.do(*arguments, "--json").stdout)

    def has_checkpoint(self) -> bool:
        """Whether a training has written one whole."""
        return any(
            method == "PUT" and "/checkpoints/" in path and path.endswith("/manifest.json")
            for method, path in self.store.requests
        )

    def is_there(self, uri: str) -> bool:
        return self.storage.exists(uri.removeprefix(f"{self.root}/"))

    def champion(self) -> int:
        champion = self.registry.champion()
        assert champion is not None
        return champion["number"]


@pytest.mark.slow
def test_the_life_of_a_model_in_a_bucket(
    tmp_path: Path,
    ray_nodes: Nodes,
    object_store: Any,
    run_cli: Callable[..., Any],
    kill_cli_at: Callable[..., list[str]],
) -> None:
    story = Story(tmp_path, ray_nodes, object_store, run_cli)

    # Killed when a checkpoint is in the bucket, the same command goes on from there.
    kill_cli_at(
        "run", "tiny.toml", cwd=tmp_path, timeout=TIMEOUT_S,
        is_time=lambda lines: story.has_checkpoint(),
    )  # fmt: skip
    first = story.get("run", "tiny.toml")
    training = first["metrics"]["train"]
    assert training["resumed_from"] >= 50
    assert training["num_workers"] == 2
    assert story.champion() == 1
    assert story.is_there(first["report"])

    # Workers and tasks ran on both nodes, and each fetched what it needed.
    workers = ray_nodes.of("run_train_fn")
    assert len(workers) == 2
    assert ray_nodes.of("FlatMap") | ray_nodes.of("_draw_chunks") == workers
    for directory in ray_nodes.directories:
        assert list(directory.glob("cache/shards/*.arrow"))
    assert not list(ray_nodes.head.temp.glob("cache/*"))

    again = story.do("run", "tiny.toml", *NOWHERE)
    assert "Everything was there already" in again.stdout

    # A fifth shard is put into the bucket: one is preprocessed, and a second version is made.
    story.put(DIGITS / "later" / "digits-0004.tar")
    done = story.do("retrain", "tiny.toml", "--json")
    found = json.loads(done.stdout)
    assert found["new"] == ["digits-0004.tar"]
    assert "5 shards (1 new)" in done.stderr
    assert (found["state"], found["version"]) == ("promoted", 2), found["sentence"]
    assert story.registry.version(2)["parent"] == 1
    assert story.get("retrain", "tiny.toml", *NOWHERE)["state"] == "nothing_new"

    story.do("rollback", "tiny", "--root", story.root, "--reason", "bad eyes")
    assert story.champion() == 1
    accepted = story.do("accept-reference", "tiny.toml", "--reason", "five shards")
    assert "tiny pins evaluation 2" in accepted.stdout
    one, two = story.registry.evaluations()
    assert one["reference"] != two["reference"]
    (later,) = story.registry.records("scores")
    assert (later["version"], later["score"]["protocol"]["reference"]) == (1, two["reference"])

    # A search of two trials, and of its finalists with other seeds.
    search = story.get("tune", "tiny.toml", "--set", "train.num_workers=1")
    assert search["metrics"]["tune"]["counts"] == {"trials": 2, "finished": 2}
    assert story.is_there(search["search"])

    # The home page links what is there.
    (home,) = story.get("report", story.root).values()
    assert home == f"{story.root}/index.html"
    page = story.storage.read("index.html").decode()
    for run, name in ((first["run"], "report"), (search["run"], "tune")):
        assert f'href="runs/{run}/{name}.html"' in page
    runs = {d["run"]: d["executions"] for d in story.get("status", story.root)["runs"]}
    assert [e["outcome"] for e in runs[first["run"]][1:]] == ["done", "done"]

    # The champion's run is judged again under what is pinned now, and that is all.
    story.store.filesystem.rm_file(f"{story.bucket}/shards/digits-0004.tar")
    judged = {s["step"]: s["action"] for s in story.get("run", "tiny.toml", *NOWHERE)["steps"]}
    assert [step for step, action in judged.items() if action != "cached"] == ["promote", "report"]
    assert story.champion() == 1

    # What no version needs goes; what the champion was made of stays.
    clean = ("gc", story.root, "--keep-runs", "0", "--grace-days", "0")
    would = story.get(*clean, "--dry-run")["deleted"]
    gone = story.get(*clean)["deleted"]
    assert gone == would
    assert {"runs", "steps/trial", "steps/tune"} <= {unit["kind"] for unit in gone["items"]}
    assert not any(story.storage.list(unit["path"]) for unit in gone["items"])
    again = story.do("run", "tiny.toml", *NOWHERE)
    assert "Everything was there already" in again.stdout

    # The same by a job on the cluster, which finds the data set and trains anew.
    text = (tmp_path / "tiny.toml").read_text().replace('name = "tiny"', 'name = "job"')
    (tmp_path / "job.toml").write_text(text)
    job = ("run", "job.toml", "--set", "train.num_steps=20")
    submitted = story.do("submit", "--address", ray_nodes.head.address, *job)
    assert "preprocess kept" in submitted.stdout
    (version,) = Registry(story.storage, "job").versions()
    assert version["checkpoint"]["global_step"] == 20
    again = story.do("submit", "--address", ray_nodes.head.address, *job)
    assert "Everything was there already" in again.stdout

    # Nothing was left where the commands were given.
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml", "job.toml"}
