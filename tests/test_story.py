"""The whole path on a real Ray with two gloo workers: killed in every step, and finished.

One Ray cluster and two `fit()`s for everything here, so the tests share one run.
"""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.registry import Registry
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage
from pipeline.train import train_in_process
from pipeline.units import missing_units
from pipeline.workflow import read_artifact, read_manifest

from .conftest import DIGITS, TINY

STEPS = ("preprocess", "features", "reference", "train", "evaluate")


class Story:
    """A run on the shared cluster, killed in each step on the way."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory = directory
        self.config_path = directory / "tiny.toml"
        text = TINY.format(sources=DIGITS / "digits-*.tar")
        text = text.replace("num_steps = 300", "num_steps = 120")
        text = text.replace("checkpoint_every = 50", "checkpoint_every = 20")
        self.config_path.write_text(text + "sweep_samples = 64\n")
        # A package of the name in the directory where jobs are started must not matter.
        (directory / "pipeline").mkdir()
        (directory / "pipeline" / "__init__.py").write_text("raise RuntimeError('not ours')")
        self.arguments = (str(self.config_path), "--set", f"cluster.address={address}")
        self.killed: dict[str, list[str]] = {}
        self.last: dict[str, Any] = {}
        self.last_lines = ""

    def manifest(self, step: str) -> dict[str, Any]:
        config = load_config(self.config_path, [f"storage.root={self.directory / 'runs'}"])
        planned = {p.step.name: p for p in make_plan(config).steps}
        manifest = read_manifest(self.storage, step, planned[step].key)
        assert manifest is not None
        return manifest

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(str(self.directory / "runs"))


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory,
    ray_cluster: str,
    kill_cli_at: Callable[..., list[str]],
    run_cli: Callable[..., Any],
) -> Story:
    """Starts the run six times: five are killed, each in its step, the sixth finishes."""
    told = Story(tmp_path_factory.mktemp("story"), ray_cluster)

    def is_in(step: str) -> Callable[[list[str]], bool]:
        if step == "train":  # not at its start but with checkpoints behind it
            checkpoints = told.directory / "runs" / "steps" / "train"
            return lambda _: bool(list(checkpoints.glob("*/checkpoints/*/manifest.json")))
        if step == "evaluate":  # with some images drawn and others not
            chunks = told.directory / "runs" / "steps" / "evaluate"
            return lambda _: bool(list(chunks.glob("*/chunks/*.safetensors")))
        return lambda lines: any(line.startswith(f"{step:<10} runs") for line in lines)

    for step in STEPS:
        told.killed[step] = kill_cli_at(
            "run", *told.arguments, cwd=told.directory, is_time=is_in(step)
        )
    done = run_cli("run", *told.arguments, "--json", cwd=told.directory)
    assert done.returncode == 0, done.stdout + done.stderr
    told.last, told.last_lines = json.loads(done.stdout), done.stderr
    return told


def test_every_start_continues_where_the_last_was_killed(story: Story) -> None:
    for index, step in enumerate(STEPS):
        lines = story.killed[step]
        kept = [line.split()[0] for line in lines if line.rstrip().endswith("kept")]
        # The start before was killed one step earlier; that step runs again, those before do not.
        assert kept == list(STEPS[: max(index - 1, 0)]), "".join(lines)
        assert not any("waiting for process" in line for line in lines)


def test_training_continued_from_a_checkpoint(story: Story) -> None:
    text = "".join(story.killed["evaluate"])
    assert re.search(r"train +continues: continues from the checkpoint at step \d+", text), text
    assert 20 <= story.manifest("train")["metrics"]["resumed_from"] < 120


def test_evaluation_kept_the_images_it_had_drawn(story: Story) -> None:
    first = re.search(r"evaluate +(\d+) of 896 samples", story.last_lines)
    assert first is not None, story.last_lines
    assert int(first[1]) >= 64


def test_killed_and_resumed_on_two_workers_equals_one_process(story: Story, tmp_path: Path) -> None:
    config = load_config(story.config_path)
    storage = LocalStorage(str(tmp_path))
    story_data = story.manifest("preprocess")
    shutil.copytree(Path(story.storage.uri, "steps"), tmp_path / "steps")
    train_in_process(config, storage, "alone", story_data)
    alone = CheckpointStore(storage, "alone").load(config.train.num_steps)
    assert alone is not None
    content = read_artifact(story.storage, story.manifest("train"), "ema.safetensors")
    for name, weight in safetensors.torch.load(content).items():
        assert torch.allclose(weight, alone.ema[name], atol=1e-3), name
    history = read_artifact(story.storage, story.manifest("train"), "metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in history.splitlines()]
    assert losses == pytest.approx([entry["loss"] for entry in alone.history], rel=1e-2)


def test_the_score_has_its_protocol_floor_and_ceiling(story: Story) -> None:
    score = story.last["metrics"]["evaluate"]
    assert score["metric"] == "fid[classifier]"
    assert 0 < score["floor"] < score["value"] < score["ceiling"]
    assert score["protocol"]["num_samples"] == 128
    assert score["protocol"]["reference_split"] == "test"
    assert score["protocol"]["reference_count"] == 297
    assert story.last["metrics"]["features"]["validation_accuracy"] > 0.5


def test_the_record_has_all_scores(story: Story) -> None:
    manifest = story.manifest("evaluate")
    record = json.loads(read_artifact(story.storage, manifest, "score.json"))
    assert record == story.last["metrics"]["evaluate"]
    assert record["unbiased"]["low"] <= record["unbiased"]["value"] <= record["unbiased"]["high"]
    assert record["unbiased"]["value"] < record["value"]
    assert record["kid"]["metric"] == "kid[classifier]"
    assert 1 < record["inception_score"]["value"] <= 10
    assert 0 <= record["precision_recall"]["recall"] <= 1
    assert record["degenerate"] == {"count": 128, "constant": 0, "black": 0}
    assert not record["copies"]["is_memorising"]
    assert len(record["copies"]["nearest"]) == 8
    sweeps = record["sweeps"]
    assert (sweeps["metric"], sweeps["num_samples"]) == ("fid[classifier]", 64)
    assert [x for x, _ in sweeps["values"]["num_steps"]] == [5, 10, 20, 50, 100]
    assert sweeps["values"]["eta"][0][1] == pytest.approx(sweeps["values"]["num_steps"][1][1])


def test_the_same_network_as_a_model_folder_scores_the_same(
    story: Story, run_cli: Callable[..., Any]
) -> None:
    exported = run_cli("export", story.arguments[0], "--output", "exported", cwd=story.directory)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    done = run_cli(
        "evaluate", *story.arguments, "--checkpoint", "exported", "--json", cwd=story.directory
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {step["step"]: step["action"] for step in json.loads(done.stdout)["steps"]}
    assert steps == {"preprocess": "cached", "features": "cached", "reference": "cached",
                     "evaluate": "run", "report": "run"}  # fmt: skip
    ours = story.last["metrics"]["evaluate"]
    theirs = json.loads(done.stdout)["metrics"]["evaluate"]
    assert theirs["value"] == pytest.approx(ours["value"], rel=1e-9)
    assert theirs["ceiling"] is None
    assert theirs["protocol"] == ours["protocol"]
    page = Path(json.loads(done.stdout)["report"]).read_text()
    assert "an untrained network" not in page
    for heading in ("Samples", "Copies?", "Between data and noise", "Protocol of the score"):
        assert f"<h2>{heading}</h2>" in page


def test_the_samples_as_images_score_the_same_and_do_not_compare(
    story: Story, run_cli: Callable[..., Any]
) -> None:
    content = read_artifact(story.storage, story.manifest("evaluate"), "samples-00000.arrow")
    samples = pa.ipc.open_file(io.BytesIO(content)).read_all()["image"].chunk(0)
    (story.directory / "pictures").mkdir()
    for k, pixels in enumerate(samples.to_numpy_ndarray()):
        Image.fromarray(pixels[0]).save(story.directory / "pictures" / f"{k:03d}.png")
    done = run_cli(
        "evaluate", *story.arguments, "--images", "pictures", "--json", cwd=story.directory
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["metrics"]["images"]["counts"]["train"] == 128
    ours, theirs = story.last["metrics"]["evaluate"], found["metrics"]["evaluate"]
    assert theirs["value"] == pytest.approx(ours["value"], rel=1e-9)
    assert theirs["precision_recall"]["count"] == ours["precision_recall"]["count"]
    page = Path(found["report"]).read_text()
    assert "<h2>Copies?</h2>" in page
    assert "<h2>Between data and noise</h2>" not in page

    (story.directory / "score.json").write_text(json.dumps(theirs))
    runs = ("compare", story.last["run"], "score.json")
    refused = run_cli(*runs, cwd=story.directory)
    assert refused.returncode == 6, refused.stdout + refused.stderr
    assert "different protocols and do not compare (seed: 0 and null;" in refused.stderr
    same = run_cli("compare", story.arguments[0], story.last["run"], cwd=story.directory)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "The scores are equal." in same.stdout


def test_a_third_of_the_images_is_held_out(story: Story) -> None:
    counts = story.last["metrics"]["preprocess"]["counts"]
    held_out = counts["validation"] + counts["test"]
    assert sum(counts.values()) == 1438
    assert held_out / 1438 == pytest.approx(1 / 3, abs=0.02)


def test_the_first_version_is_champion(story: Story) -> None:
    champion = Registry(story.storage, "tiny").champion()
    assert champion is not None
    assert champion["number"] == 1
    assert champion["score"] == story.last["metrics"]["evaluate"]
    assert champion["lineage"]["train"] == story.manifest("train")["key"]


def test_the_report_needs_no_other_file(story: Story) -> None:
    text = Path(story.last["report"]).read_text()
    assert "fid[classifier]" in text
    assert text.count("data:image/png;base64,") == 8
    assert text.count("<svg") == 5
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []
    for name in ("reference_count", "extractor_sha256", "spacing", "torchmetrics"):
        assert name in text


def test_nothing_is_left_half_written(story: Story) -> None:
    root = story.directory / "runs"
    assert list(root.rglob(".staged-*")) == []
    assert list(root.glob("steps/*/*/chunks")) == []
    assert list(root.glob("steps/train/*/ray")) == []
    executions = json.loads((Path(story.last["report"]).parent / "run.json").read_text())[
        "executions"
    ]
    assert len(executions) == 6
    assert executions[-1]["outcome"] == "done"


def test_the_same_again_finds_everything_without_ray(
    story: Story, run_cli: Callable[..., Any]
) -> None:
    # An address where nothing listens: starting or joining Ray would fail.
    done = run_cli(
        "run", str(story.config_path), "--set", "cluster.address=127.0.0.1:1",
        cwd=story.directory, timeout=20,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything was there already" in done.stdout
    assert done.stdout.count("kept") == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=2e-3", "cached cached cached run run run run"),
        ("train.num_steps=400", "cached cached cached extend run run run"),
        ("train.num_workers=1", "cached cached cached cached cached cached cached"),
        ("evaluate.num_steps=5", "cached cached cached cached run run run"),
        ("features.width=5", "cached run run cached run run run"),
        ("data.test_fraction=0.3", "run run run run run run run"),
    ],
)
def test_a_changed_setting_reruns_what_rests_on_it(
    story: Story, override: str, expected: str
) -> None:
    config = load_config(story.config_path, [override, f"storage.root={story.storage.uri}"])
    steps = make_plan(config).steps
    assert [planned.action for planned in steps] == expected.split()
    changed = next((planned for planned in steps if planned.action == "run"), None)
    if changed is not None and "extend" not in expected:
        assert f"{override.split('=')[0]} changed from" in changed.reason


def test_a_new_shard_reruns_one_unit(story: Story, run_cli: Callable[..., Any]) -> None:
    sources = [str(DIGITS / "digits-*.tar"), str(DIGITS / "later" / "*.tar")]
    done = run_cli(
        "plan", str(story.config_path), "--json", "--set", f"data.sources={json.dumps(sources)}",
        cwd=story.directory,
    )  # fmt: skip
    first = json.loads(done.stdout)["steps"][0]
    assert first["action"] == "run"
    assert "shards changed (1 added); 1 of 5 input shards to do" in first["reason"]
    config = load_config(story.config_path, [f"data.sources={json.dumps(sources)}"])
    shards = list_inputs(config.data, story.storage).shards
    missing = missing_units(shards, config.data, story.storage)
    assert [shard.name for shard in missing] == ["digits-0004.tar"]
    assert json.loads(done.stdout)["missing_shards"] == ["digits-0004.tar"]


def test_status_says_what_ran(story: Story, run_cli: Callable[..., Any]) -> None:
    everything = run_cli("status", cwd=story.directory)
    assert story.last["run"] in everything.stdout
    one = run_cli("status", story.last["run"], cwd=story.directory)
    assert "done" in one.stdout
    assert "is working on it" not in one.stdout
    for step in STEPS:
        assert step in one.stdout
