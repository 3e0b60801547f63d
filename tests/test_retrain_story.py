"""The life of a model on a real Ray: trained, retrained, rolled back, and kept from poison."""

import io
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.registry import Registry
from pipeline.storage import LocalStorage
from pipeline.workflow import read_manifest

from .conftest import DIGITS, TINY, cli_program

NUM_NOISE = 3000  # images in the poisoned shard, twice as many as there are digits
NUM_KILLS = 20
SECRET = "T0KEN"
OF_THE_MOMENT = {"by", "time", "created"}  # fields that no two runs have in common


class Story:
    """A directory of shards that grows, and a model that is retrained on it."""

    def __init__(self, directory: Path, address: str, run_cli: Callable[..., Any]) -> None:
        self.directory, self.run_cli = directory, run_cli
        self.shards = directory / "shards"
        self.shards.mkdir(parents=True)
        for path in DIGITS.glob("digits-*.tar"):
            shutil.copy(path, self.shards)
        self.config_path = directory / "tiny.toml"
        self.config_path.write_text(TINY.format(sources="shards/*.tar"))
        self.storage = LocalStorage(str(directory / "runs"))
        self.registry = Registry(self.storage, "tiny")
        settings = [
            f"cluster.address={address}",
            "train.num_workers=1",
            "retrain.num_steps=100",
            # A challenger of this size would be kept as often as promoted by the intervals.
            "promote.rule=not_worse",
            "promote.tolerance=0.5",
            f"notify.on_success=['true', '{SECRET}']",
        ]
        self.options = [part for setting in settings for part in ("--set", setting)]

    def retrain(self, *options: str, code: int) -> tuple[dict[str, Any], str]:
        arguments = (str(self.config_path), *self.options, *options, "--json")
        done = self.run_cli("retrain", *arguments, cwd=self.directory, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert found["exit_code"] == code
        return found, done.stderr

    def do(self, *arguments: str) -> str:
        done = self.run_cli(*arguments, cwd=self.directory, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def champion(self) -> int:
        champion = self.registry.champion()
        assert champion is not None
        return champion["number"]

    def settings_of_training(self, version: dict[str, Any]) -> dict[str, Any]:
        manifest = read_manifest(self.storage, "train", version["lineage"]["train"])
        assert manifest is not None
        return manifest["identity"]["settings"]


def noise_png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_the_life_of_a_model(
    tmp_path: Path,
    ray_cluster: str,
    run_cli: Callable[..., Any],
    make_tar: Callable[..., Path],
) -> None:
    story = Story(tmp_path / "story", ray_cluster, run_cli)

    # Four shards: the first version is the champion and pins its evaluation.
    found, _ = story.retrain(code=0)
    assert (found["state"], found["version"], found["cycle"]) == ("promoted", 1, 1)
    assert len(found["new"]) == 4
    first = story.registry.version(1)
    (evaluation,) = story.registry.evaluations()
    assert evaluation["reference"] == first["lineage"]["reference"]
    assert evaluation["facts"]["extractor"] == "classifier"

    # Nothing new needs no Ray: at this address there is none.
    found, lines = story.retrain("--set", "cluster.address=127.0.0.1:1", code=0)
    assert found["state"] == "nothing_new", lines
    assert "steps" not in found

    # The fifth arrives: one preprocessing task, and a challenger that goes on from the champion.
    shutil.copy(DIGITS / "later" / "digits-0004.tar", story.shards)
    found, lines = story.retrain(code=0)
    assert found["new"] == ["digits-0004.tar"]
    assert "5 shards (1 new)" in lines
    assert "digits-0004.tar passes:" in lines
    actions = {step["step"]: step["action"] for step in found["steps"]}
    assert (actions["features"], actions["reference"]) == ("cached", "cached")
    assert (found["state"], found["version"]) == ("promoted", 2), found["sentence"]
    second = story.registry.version(2)
    assert second["parent"] == 1
    for step in ("features", "reference"):
        assert second["lineage"][step] == first["lineage"][step]
    assert second["lineage"]["preprocess"] != first["lineage"]["preprocess"]
    assert second["score"]["protocol"] == first["score"]["protocol"]
    settings = story.settings_of_training(second)
    assert settings["start.weights"] == first["weights"]
    assert settings["train.num_steps"] == 100
    assert Path(found["report"]).exists()

    # Its run is that of the config now, and the champion is had by name, without Ray.
    shown = json.loads(story.do("status", str(story.config_path), *story.options, "--json"))
    assert shown["run"] == found["run"]
    assert shown["cycle"]["outcome"]["version"] == 2
    story.do("sample", "tiny", "--num", "3", "--output", "samples")
    assert len(list((story.directory / "samples").glob("0*.png"))) == 3
    exported = json.loads(story.do("export", "tiny@2", "--output", "exported", "--json"))
    assert exported["weights"]["ema"]["sha256"] == second["weights"]

    # Rolled back, the first is restored, and no cycle brings the second back by itself.
    story.do("rollback", "tiny", "--reason", "bad eyes")
    assert story.champion() == 1
    assert story.retrain(code=0)[0]["state"] == "nothing_new"
    assert story.champion() == 1
    story.do("promote", "tiny", "2", "--reason", "better eyes")

    # Noise with good labels: drift holds it, once.
    members = []
    for k in range(NUM_NOISE):
        members += [(f"{k:05d}.png", noise_png(k)), (f"{k:05d}.cls", str(k % 10).encode())]
    poison = make_tar(story.shards / "poison.tar", members)
    found, _ = story.retrain(code=9)
    assert (found["state"], found["version"]) == ("held", None)
    (record,) = found["held"]
    assert record["shard"] == "poison.tar"
    assert record["distance"] > 3 * record["limit"]
    assert len(story.registry.versions()) == 2
    found, _ = story.retrain(code=0)
    assert (found["state"], len(found["held"])) == ("nothing_new", 1)
    assert "held: poison.tar" in story.do("models", "tiny")

    # With drift switched off the gate refuses the model that learned it.
    found, _ = story.retrain("--set", "retrain.check_drift=false", code=9)
    assert (found["state"], found["version"]) == ("kept", 3), found["sentence"]
    assert "which is 50.0% worse" in found["sentence"]
    assert story.champion() == 2
    assert story.registry.version(3)["parent"] == 2
    poison.unlink()

    # Another reference: the champion is scored again, and the next cycle is judged by it.
    accepted = story.do(
        "accept-reference", str(story.config_path), *story.options, "--reason", "five shards"
    )
    assert "tiny pins evaluation 2" in accepted
    again = story.do("accept-reference", str(story.config_path), *story.options)
    assert "tiny pinned already evaluation 2" in again
    one, two = story.registry.evaluations()
    assert one["reference"] != two["reference"]
    assert two["data"] == second["lineage"]["preprocess"]
    (later,) = story.registry.records("scores")
    assert later["version"] == 2
    assert later["score"]["protocol"]["reference"] == two["reference"]
    assert [p["version"] for p in story.registry.promotions()] == [1, 2, 1, 2]

    # Rolled back past it, the champion has no score under it, and the next cycle makes that first.
    story.do("rollback", "tiny", "--reason", "second thoughts")
    found, lines = story.retrain(code=0)
    assert "version 1, the champion, has no score under evaluation 2, and gets it first" in lines
    assert (found["state"], found["version"]) == ("promoted", 4), found["sentence"]
    assert len(story.registry.evaluations()) == 2
    again, _ = (record["version"] for record in story.registry.records("scores"))
    assert again == 1
    assert list(story.directory.rglob(".staged-*")) == []
    kept = [path for path in (story.directory / "runs").rglob("*") if path.is_file()]
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []


class Killed:
    """A cycle that is killed at random moments, in one copy of a storage root after another."""

    def __init__(self, story: Story, before: Path, seconds: float) -> None:
        self.story, self.before, self.seconds = story, before, seconds
        self.random = random.Random(0)
        self.root = story.directory / "runs"
        self.num_kills = 0

    def start_over(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.before, self.root)

    def retrain_for_a_while(self) -> bool:
        """Starts the cycle and kills it at a random moment; whether it ended before that."""
        arguments = (str(self.story.config_path), *self.story.options)
        process = subprocess.Popen(
            [cli_program(), "retrain", *arguments],
            cwd=self.story.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            out, _ = process.communicate(timeout=self.random.uniform(0, self.seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            out, _ = process.communicate()
        if process.returncode == -signal.SIGKILL:
            self.num_kills += 1
            return False
        assert process.returncode == 0, out
        return True


def documents(root: Path) -> Iterator[tuple[str, Any]]:
    """Every record of the registry and every manifest, parsed: a half-written one would raise."""
    for path in sorted([*root.glob("models/**/*.json"), *root.glob("steps/**/manifest.json")]):
        yield str(path.relative_to(root)), json.loads(path.read_text())


def registry_of(root: Path) -> dict[str, Any]:
    """All records of a registry, but for who wrote them when, and what belongs to leases."""
    return {
        name: {key: value for key, value in document.items() if key not in OF_THE_MOMENT}
        for name, document in documents(root)
        if name.startswith("models/") and "lease-" not in name and "/retrain/" not in name
    }


@pytest.mark.slow
def test_a_cycle_killed_at_twenty_moments_ends_as_the_uninterrupted_one(
    tmp_path: Path, ray_cluster: str, run_cli: Callable[..., Any]
) -> None:
    story = Story(tmp_path / "story", ray_cluster, run_cli)
    story.options += ["--set", "train.num_steps=100", "--set", "train.checkpoint_every=10"]
    story.retrain(code=0)
    shutil.copy(DIGITS / "later" / "digits-0004.tar", story.shards)
    before = tmp_path / "before"
    shutil.copytree(story.directory / "runs", before)
    started = time.monotonic()
    found, _ = story.retrain(code=0)
    seconds = time.monotonic() - started
    assert found["version"] == 2
    whole = registry_of(story.directory / "runs")
    assert {name.split("/")[2] for name in whole} == {
        "cycles", "evaluations", "outcomes", "promotions", "versions",
    }  # fmt: skip

    killed = Killed(story, before, seconds)
    num_whole = 0
    killed.start_over()
    while killed.num_kills < NUM_KILLS or num_whole == 0:
        is_over = killed.retrain_for_a_while()
        assert list(documents(killed.root))
        if is_over:
            assert registry_of(killed.root) == whole
            num_whole += 1
            killed.start_over()
    story.retrain(code=0)  # what the last kill left is finished too
    assert registry_of(killed.root) == whole
    assert list((killed.root / "models").rglob(".staged-*")) == []
