"""A search on a real Ray: killed in its middle, continued, read as a page, and used by `run`."""

import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import connect
from pipeline.config import load_config, override_config
from pipeline.driver import make_plan
from pipeline.ray_train import Places
from pipeline.settings import SpaceConfig
from pipeline.storage import LocalStorage
from pipeline.tune.planted import planted_trial, score_of_choice
from pipeline.tune.proposer import Proposer
from pipeline.tune.records import Entry, Records, Result
from pipeline.tune.scheduling import run_trials

from .conftest import DIGITS, TINY

TUNE = """
[tune]
num_trials = 4
max_concurrent = 1
num_samples = 64
num_steps = 4
num_finalists = 1
num_seeds = 2
train_steps = 30
grace_images = 320
[tune.space]
schedule = ["linear", "cosine"]
[tune.space.linear]
beta_start = [1e-4, 1e-2]
ratio = [2.0, 200.0]
"""


DEADLINE_S = 60  # for what takes seconds


class Story:
    """A config with a search, on the shared cluster."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory = directory
        self.config_path = directory / "tiny.toml"
        text = TINY.format(sources=DIGITS / "digits-*.tar") + TUNE
        self.config_path.write_text(text.replace("num_workers = 2", "num_workers = 1"))
        self.arguments = (str(self.config_path), "--set", f"cluster.address={address}")
        self.results_when_killed: dict[str, bytes] = {}
        self.done: dict[str, Any] = {}
        self.lines = ""

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(str(self.directory / "runs"))

    @property
    def experiment(self) -> Path:
        (found,) = (self.directory / "runs" / "steps" / "tune").iterdir()
        return found

    def results(self) -> dict[str, bytes]:
        paths = (self.directory / "runs" / "steps" / "tune").glob("*/trials/*/result.json")
        return {path.parent.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory,
    ray_cluster: str,
    kill_cli_at: Callable[..., list[str]],
    run_cli: Callable[..., Any],
) -> Story:
    """Kills the search once two trials have ended, and lets the same command finish it."""
    told = Story(tmp_path_factory.mktemp("tune"), ray_cluster)
    kill_cli_at(
        "tune", *told.arguments, cwd=told.directory, timeout=300,
        is_time=lambda lines: len(told.results()) >= 2,
    )  # fmt: skip
    told.results_when_killed = told.results()
    done = run_cli("tune", *told.arguments, "--json", cwd=told.directory, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told.done, told.lines = json.loads(done.stdout), done.stderr
    return told


def test_finished_trials_are_kept_and_the_others_run(story: Story) -> None:
    count = len(story.results_when_killed)
    assert f"{count} of 4 trials are there already" in story.lines
    now = story.results()
    assert {name: now[name] for name in story.results_when_killed} == story.results_when_killed
    records = Records(story.storage, f"steps/tune/{story.experiment.name}")
    entries = records.entries()
    searched = [entry.name for entry in entries if "-seed" not in entry.name]
    assert searched == ["0000", "0001", "0002", "0003"]
    assert all(records.result(entry) is not None for entry in entries)
    for name in story.results_when_killed:
        assert f"trial {name} (" not in story.lines


def test_the_config_as_it_is_competes_and_is_trained_with_as_many_seeds(story: Story) -> None:
    document = json.loads(
        (story.directory / "runs" / "runs" / story.done["run"] / "tune.json").read_text()
    )
    counts = {f["number"]: f["count"] for f in document["finalists"]}
    assert counts[0] == 2
    assert len(counts) == 2
    assert document["protocol"]["reference_split"] == "validation"
    assert document["verdict"]["kind"] in ("best", "not distinguishable")
    if document["verdict"]["kind"] == "not distinguishable" and 0 in document["verdict"]["tied"]:
        assert document["recommended"] == 0
    stopped = [t for t in document["trials"] if t["outcome"] == "stopped"]
    assert all(t["rungs"][-1]["images_seen"] < 30 * 32 for t in stopped)


def test_only_scores_and_pictures_of_trials_stay(story: Story) -> None:
    root = story.directory / "runs"
    assert list(root.glob("steps/trial/*/checkpoints/*")) == []
    assert list(root.rglob("*.pkl")) == []
    assert list(root.glob("steps/tune/*/ray")) == []
    assert list(root.rglob(".staged-*")) == []
    assert len(list(root.glob("steps/tune/*/logs/*/events.out.tfevents*"))) >= 4


def test_the_page_needs_no_other_file_and_its_command_works(
    story: Story, call_cli: Callable[..., Any]
) -> None:
    page = Path(story.done["search"]).read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []
    for heading in ("Train what is recommended", "Learning curves", "All trials at once",
                    "Leaderboard of the search", "Refused before training", "Cost"):  # fmt: skip
        assert f"<h2>{heading}" in page
    printed = re.search(r'<pre class="command">(.*?)</pre>', page, re.S)
    assert printed is not None
    words = shlex.split(printed[1].replace("&#39;", "'").replace("&#34;", '"'))
    assert words[:3] == ["raydiffusion", "run", str(story.config_path)]
    plan = call_cli("plan", *words[2:], "--json", cwd=story.directory)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    by_hand = {s["step"]: s["key"] for s in json.loads(plan.stdout)["steps"]}
    config = load_config(story.config_path, [f"storage.root={story.storage.uri}"])
    planned = make_plan(override_config(config, ["tune.enabled=true"]))
    keys = {p.step.name: p.key for p in planned.steps}
    assert keys.pop("tune") == story.experiment.name
    assert keys == by_hand  # what `run` with a search does next hits the same cache


def test_the_table_has_every_training(story: Story) -> None:
    path = story.directory / "runs" / "runs" / story.done["run"] / "trials.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(rows) == 4 + 2 * 2
    assert {row["outcome"] for row in rows} <= {"finished", "stopped"}


def test_the_same_again_is_cached_and_the_page_is_written_again(
    story: Story, call_cli: Callable[..., Any]
) -> None:
    page = Path(story.done["search"])
    before = page.read_text()
    page.unlink()
    # An address where nothing listens: starting or joining Ray would fail.
    done = call_cli(
        "tune", story.arguments[0], "--set", "cluster.address=127.0.0.1:1", cwd=story.directory
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything was there already" in done.stdout
    assert "to train it:" in done.stdout
    again = call_cli("report", story.done["run"], cwd=story.directory)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(page.read_text()) == pytest.approx(len(before), abs=200)


def test_a_space_without_anything_feasible_is_a_config_error(
    story: Story, run_cli: Callable[..., Any]
) -> None:
    done = run_cli(
        "tune", *story.arguments, "--set", 'tune.space.schedule=["linear"]',
        "--set", "tune.space.linear.beta_start=[0.5, 0.9]", cwd=story.directory,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "None of 200 proposals drawn from tune.space can be trained" in done.stderr


@pytest.mark.slow
def test_failed_trials_are_recorded_and_the_search_goes_on(
    story: Story, run_cli: Callable[..., Any]
) -> None:
    done = run_cli(
        "tune", *story.arguments, "--json", "--set", "tune.space.schedule=[]",
        "--set", "tune.space.learning_rate=[1e25, 1e30]", "--set", "train.max_rewinds=0",
        "--set", "tune.num_trials=3", cwd=story.directory, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads(done.stdout)["metrics"]["tune"]
    assert metrics["counts"] == {"trials": 3, "finished": 1, "failed": 2}
    assert metrics["recommended"] == 0
    page = Path(json.loads(done.stdout)["search"]).read_text()
    assert "<h2>Failed trials" in page


@pytest.mark.slow
def test_one_cpu_and_more_trials_than_it_holds(story: Story, run_cli: Callable[..., Any]) -> None:
    done = run_cli(
        "tune", story.arguments[0], "--json", "--set", "cluster.num_cpus=1",
        "--set", "tune.num_trials=6", "--set", "tune.max_concurrent=5",
        cwd=story.directory, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads(done.stdout)["metrics"]["tune"]
    assert metrics["counts"]["trials"] == 6
    assert metrics["cost"]["at_a_time"] == 1


@pytest.mark.slow
def test_trials_of_two_workers_train_through_ray_train_though_one_is_killed(
    story: Story, ray_cluster: str, run_cli: Callable[..., Any]
) -> None:
    root, killed = story.directory / "two", []

    def kill_one() -> None:
        """Kills a trial's process, from outside, once it has trained for a while."""
        while not list(root.glob("steps/trial/*/checkpoints/*")):
            time.sleep(0.1)
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if not (path / "cmdline").read_bytes().startswith(b"ray::ImplicitFunc"):
                    continue
                variables = (path / "environ").read_bytes().split(b"\0")
                (raylet,) = (v[15:] for v in variables if v.startswith(b"RAY_RAYLET_PID="))
                if ray_cluster.encode() in Path(f"/proc/{raylet.decode()}/cmdline").read_bytes():
                    os.kill(int(path.name), signal.SIGKILL)
                    killed.append(path.name)

    threading.Thread(target=kill_one, daemon=True).start()
    done = run_cli(
        "tune", *story.arguments, "--json", "--set", "train.num_workers=2",
        "--set", "tune.num_trials=2", "--set", f"storage.root={root}",
        cwd=story.directory, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(killed) == 1
    metrics = json.loads(done.stdout)["metrics"]["tune"]
    assert metrics["counts"]["trials"] == 2
    assert metrics["counts"]["finished"] >= 1
    assert "failed" not in metrics["counts"]
    assert metrics["cost"]["at_a_time"] == 1
    assert list(root.glob("steps/trial/*/verdicts/*")) == []
    assert list(root.glob("steps/trial/*/ray")) == []


@pytest.mark.slow
def test_run_with_a_search_trains_what_it_recommends(
    story: Story, run_cli: Callable[..., Any]
) -> None:
    enabled = ("--set", "tune.enabled=true", "--set", "train.num_steps=60")
    planned = run_cli("plan", *story.arguments, *enabled, cwd=story.directory)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    done = run_cli("run", *story.arguments, *enabled, "--json", cwd=story.directory, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [s["step"] for s in found["steps"]] == [
        "preprocess", "features", "reference", "tune", "train", "evaluate", "promote", "report"
    ]  # fmt: skip
    assert found["metrics"]["evaluate"]["protocol"]["reference_split"] == "test"
    record = json.loads((Path(found["report"]).parent / "run.json").read_text())
    assert record["executions"][-1]["outcome"] == "done"
    again = run_cli(
        "run", story.arguments[0], *enabled, "--set", "cluster.address=127.0.0.1:1",
        cwd=story.directory,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Everything was there already" in again.stdout


@pytest.fixture
def make_controller() -> Callable[[int], Any]:
    """Makes what holds CPUs of the shared cluster, as Ray Train's controller does for workers."""

    def make(num_cpus: int) -> Any:  # Ray takes it along by value
        import ray
        from ray.util import placement_group

        class Controller:
            def take(self) -> None:
                ray.get(placement_group([{"CPU": num_cpus}]).ready(), timeout=DEADLINE_S)

        controller: Any = ray.remote(num_cpus=0)(Controller).remote()
        ray.get(controller.take.remote(), timeout=DEADLINE_S)
        return controller

    return make


def test_what_the_workers_of_an_ended_trial_held_is_given_back(
    ray_cluster: str, story: Story, make_controller: Callable[[int], Any]
) -> None:
    import ray
    from ray.util import placement_group_table

    def taken() -> list[str]:
        job = ray.get_runtime_context().get_job_id()
        return [
            key
            for key, facts in placement_group_table().items()
            if key.endswith(job) and facts["state"] != "REMOVED"
        ]

    def free_until(count: int, places: Places, **options: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(taken()) != count:
            places.free(**options)
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with connect(load_config(story.config_path, [f"cluster.address={ray_cluster}"])):
        places, one = Places(), make_controller(1)
        ray.kill(one)
        later, two = Places(), make_controller(1)
        assert len(taken()) == 2  # Ray keeps that of the dead one while the job lives
        later.free(of_the_dead=True)
        assert len(taken()) == 2  # one was there before, the other's maker lives
        free_until(1, places, of_the_dead=True)
        free_until(0, later)
        ray.kill(two)


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_does_not_keep_its_places(
    tmp_path: Path, ray_cluster: str, story: Story, make_controller: Callable[[int], Any]
) -> None:
    given = [
        f"cluster.address={ray_cluster}",
        f"storage.root={tmp_path / 'runs'}",
        "tune.stopping=none",
        "train.num_workers=2",
    ]
    config = load_config(story.config_path, given)
    choice = {"schedule": "linear", "linear.beta_start": 1e-4, "linear.ratio": 200.0}
    entries = [Entry("0001", 1, choice, (), "k")]
    results: list[Result] = []
    storage = LocalStorage(str(tmp_path / "runs"))

    def killed_once(trial: dict[str, Any], common: dict[str, Any]) -> None:
        controller = make_controller(2)  # all that there are
        mark = Path(common["storage"]) / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        planted_trial(trial, common)
        del controller

    with connect(config):
        run_trials(
            config, storage, {}, Records(storage, "steps/tune/killed"),
            lambda: entries.pop() if entries else None,
            lambda entry, result: results.append(result),
            count=1, at_a_time=1, rungs=[30], trainable=killed_once,
        )  # fmt: skip
    assert (tmp_path / "runs" / "killed").exists()
    assert [result.outcome for result in results] == ["finished"]


@pytest.mark.slow
def test_a_planted_optimum_is_found_by_trials_of_ray_tune(
    tmp_path: Path, ray_cluster: str, story: Story
) -> None:
    space = SpaceConfig.model_validate(
        {"schedule": ("linear",), "linear": {"beta_start": (1e-6, 1e-3), "ratio": (2.0, 2000.0)}}
    )
    given = [
        f"cluster.address={ray_cluster}",
        f"storage.root={tmp_path / 'runs'}",
        "tune.stopping=none",
    ]
    config = load_config(story.config_path, given)
    proposer, scores = Proposer(space, "tpe", 0), []
    numbers = iter(range(1, 25))

    def source() -> Entry | None:
        while (number := next(numbers, None)) is not None:
            proposal = proposer.ask(number)
            assert proposal is not None
            if math.isfinite(score_of_choice(proposal.choice)):
                return Entry(f"{number:04d}", number, proposal.choice, proposal.overrides, "k")
            proposer.tell(number, None, {})
        return None

    def on_end(entry: Entry, result: Result) -> None:
        assert result.value == score_of_choice(entry.choice)
        scores.append(result.value)
        proposer.tell(entry.number, result.value, result.by_images)

    storage = LocalStorage(str(tmp_path / "runs"))
    with connect(config):
        run_trials(
            config, storage, {}, Records(storage, "steps/tune/planted"), source, on_end,
            count=24, at_a_time=2, rungs=[30], trainable=planted_trial,
        )  # fmt: skip
    assert len(scores) > 12
    assert min(scores) < 0.01  # the optimum is 0.003, the median of random choices 0.05
