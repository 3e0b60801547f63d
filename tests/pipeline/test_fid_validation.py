"""Scores beside training, with the task that scores in this process."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from diffusion_core import UNet
from pipeline import fid_validation
from pipeline.checkpoints import to_safetensors
from pipeline.config import load_config
from pipeline.drawing import iter_drawn
from pipeline.errors import DataError, EvaluationError, StorageError
from pipeline.extractors import load_extractor
from pipeline.extractors.small import SmallNetwork
from pipeline.fid_validation import Scorer, score_weights, scores_beside
from pipeline.fid_weights import WeightsHandover
from pipeline.models import make_diffusion, make_unet
from pipeline.reference import read_features
from pipeline.scores.frechet import frechet_distance, sum_features
from pipeline.settings import Config
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage
from pipeline.subjects import Network
from pipeline.workflow import StepContext, plan

SETTINGS = [
    "train.fid_every=10",
    "train.fid_samples=72",
    "train.num_steps=30",
    "evaluate.num_steps=2",
]


class Now:
    """Scores at once, here; or when `is_ready` is set, or fails."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.was_sent = threading.Event()
        self.is_ready, self.is_cancelled = True, False
        self.error: Exception | None = None
        self._arguments: tuple[Any, ...] = ()

    def send(self, *arguments: Any) -> None:
        self.sent.append(Path(arguments[-1]).stem)
        self._arguments = arguments
        self.was_sent.set()

    def is_done(self) -> bool:
        return self.is_ready

    def result(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return score_weights(*self._arguments)

    def cancel(self) -> None:
        self.is_cancelled = True


def make_network(config: Config, seed: int) -> UNet:
    """One whose output is not zero, as that of a new one is."""
    model = make_unet(config, 0, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


class Training:
    """A storage root with the steps before training, and rank 0 with a network."""

    def __init__(
        self, root: Path, config_path: Path, *settings: str, num_features: int = 4
    ) -> None:
        self.config: Config = load_config(config_path, [*SETTINGS, *settings])
        self.storage = LocalStorage(str(root))
        self.notes: list[str] = []
        torch.manual_seed(0)
        weights = to_safetensors(SmallNetwork(1, num_features, 10).state_dict())
        drawn = np.random.default_rng(0).normal(size=(60, num_features)).astype(np.float32)
        found = safetensors.torch.save({"features": torch.from_numpy(drawn)})
        inputs: dict[str, Mapping[str, Any]] = {
            "preprocess": self._finish("preprocess", {}),
            "features": self._finish(
                "features", {"extractor.safetensors": weights},
                extractor="classifier", channels=1, num_features=num_features, num_classes=10,
                classifies=True,
            ),
            "reference": self._finish(
                "reference", {"validation-00000.safetensors": found},
                counts={"train": 60, "validation": 60, "test": 60},
            ),
        }  # fmt: skip
        planned = {p.step.name: p for p in plan(make_steps(self.config, []), self.storage)}
        self.context = StepContext(
            self.config,
            self.storage,
            planned["train"],
            inputs,
            lambda event: self.notes.append(event.fields["text"]),
        )
        self.task = Now()
        self.scorer = Scorer(self.context, self.task)
        self.directory = self.scorer.directory

    def _finish(self, step: str, files: dict[str, bytes], **metrics: Any) -> dict[str, Any]:
        artifacts = {}
        for name, content in files.items():
            self.storage.create(f"steps/{step}/k/{name}", content)
            artifacts[name] = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        return {"step": step, "key": "k", "artifacts": artifacts, "metrics": metrics}

    def hand_over(self, step: int, seed: int = 0) -> None:
        """What rank 0 does, with weights of this seed."""
        handover = WeightsHandover(self.storage, self.directory)
        handover.hand_over(step, make_network(self.config, seed))
        handover.close()

    def pass_by(self, step: int, seed: int = 0) -> None:
        """Training comes by a step, and its score is made."""
        self.hand_over(step, seed)
        self.scorer.reach(step)
        self.scorer.look()
        self.scorer.look()

    def files(self, kind: str) -> list[str]:
        return self.storage.list(f"{self.directory}/{kind}")

    def shown(self) -> list[dict[str, Any]]:
        path = f"{self.context.series_directory}/fid.jsonl"
        return [json.loads(line) for line in self.storage.read(path).splitlines()]


@pytest.fixture
def training(tmp_path: Path, tiny_config: Path) -> Training:
    return Training(tmp_path / "root", tiny_config)


def test_weights_become_a_score_with_its_protocol(training: Training) -> None:
    training.pass_by(10)
    (row,) = training.shown()
    assert row["global_step"] == 10
    assert row["value"] > 0
    protocol = row["protocol"]
    assert (protocol["reference_split"], protocol["reference_count"]) == ("validation", 60)
    # The noise of the final score begins with sample 0.
    assert (protocol["num_samples"], protocol["first_sample"]) == (72, 128)
    assert training.files("weights") == []
    assert training.notes == [
        f"fid[classifier] {row['value']:.2f} at step 10 (72 samples, 60 validation images, "
        f"{row['seconds']:.0f} s)"
    ]
    directory = Path(training.storage.uri, training.context.series_directory, "tensorboard", "fid")
    assert len(list(directory.iterdir())) == 1


def test_one_waits_at_most_and_the_others_are_left_out_and_said_once(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    training.task.is_ready = False
    handover = WeightsHandover(training.storage, training.directory)
    for step in (10, 20, 30):
        handover.hand_over(step, make_network(training.config, step))
        handover._pool.submit(lambda: None).result()  # until it is written
        training.scorer.look()
    assert [record.getMessage() for record in caplog.records] == [
        "The FID at step 20 is left out, and so are those after it until there is time: that at "
        "step 10 is not done"
    ]
    assert len(training.task.sent) == 1
    training.task.is_ready = True
    training.scorer.look()
    handover.hand_over(40, make_network(training.config, 40))
    handover.close()
    training.scorer.look()
    assert [name[:9] for name in training.task.sent] == ["000000010", "000000040"]


def test_training_never_waits_for_weights_to_be_written(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = threading.Event()
    create = LocalStorage.create
    monkeypatch.setattr(
        LocalStorage, "create", lambda *args: slow.wait(timeout=30) and create(*args)
    )
    handover = WeightsHandover(training.storage, training.directory)
    model = make_network(training.config, 0)
    handover.hand_over(10, model)
    with torch.no_grad():
        next(model.parameters()).zero_()  # what is written is the step's, not what came after it
    handover.hand_over(20, model)
    slow.set()
    handover.close()
    assert "The FID at step 20 is left out" in caplog.text
    (file,) = training.files("weights")
    written = training.storage.read(f"{training.directory}/weights/{file}")
    assert written == to_safetensors(make_network(training.config, 0).state_dict())


def test_a_resumed_training_finds_the_scores_of_its_weights_and_replaces_others(
    training: Training,
) -> None:
    for step in (10, 20):
        training.pass_by(step)
    first = training.shown()
    training.hand_over(10)
    assert training.files("weights") == []  # made once
    training.hand_over(20, seed=1)
    assert [name[:9] for name in training.files("scores")] == ["000000010"]
    training.scorer.look()
    assert training.shown() == first[:1]
    training.scorer.look()
    second = training.shown()
    assert second[0] == first[0]
    assert second[1]["value"] != first[1]["value"]


def test_a_score_of_weights_that_training_left_behind_is_not_kept(training: Training) -> None:
    training.hand_over(10)
    training.scorer.look()
    training.hand_over(10, seed=1)  # it went back while that was scored
    training.scorer.look()
    assert training.files("scores") == []
    training.scorer.look()
    assert training.task.sent[0] != training.task.sent[1]
    assert [name.removesuffix(".json") for name in training.files("scores")] == training.task.sent[
        1:
    ]


def test_weights_of_a_killed_run_are_scored_by_the_next(
    training: Training, tmp_path: Path, tiny_config: Path
) -> None:
    training.hand_over(20)
    again = Training(tmp_path / "root", tiny_config)
    again.scorer.begin(10)
    again.scorer.look()
    again.scorer.look()
    assert [name[:9] for name in again.files("scores")] == ["000000020"]
    again.scorer.reach(19)
    assert again.scorer.rows() == []  # as metrics.jsonl is cut at the checkpoint
    again.scorer.reach(20)
    assert len(again.scorer.rows()) == 1


def test_a_driver_killed_between_score_and_weights_scores_no_second_time(
    training: Training,
) -> None:
    training.pass_by(10)
    name = training.files("scores")[0].removesuffix(".json")
    training.storage.create(f"{training.directory}/weights/{name}.safetensors", b"")
    training.scorer.look()
    assert training.files("weights") == []
    assert len(training.task.sent) == 1


def test_later_scores_that_training_will_not_come_by_are_dropped(
    training: Training, tmp_path: Path, tiny_config: Path
) -> None:
    for step in (10, 20, 30):
        training.pass_by(step)
    again = Training(tmp_path / "root", tiny_config, "train.fid_every=15")
    again.scorer.begin(10)
    again.scorer.look()
    assert [name[:9] for name in again.files("scores")] == ["000000010", "000000030"]


def test_another_protocol_begins_another_curve(
    training: Training, tmp_path: Path, tiny_config: Path
) -> None:
    training.pass_by(10)
    training.hand_over(20)
    again = Training(tmp_path / "root", tiny_config, "evaluate.num_steps=3")
    assert again.context.series_directory == training.context.series_directory
    assert again.directory != training.directory
    assert training.files("weights") == []
    again.scorer.reach(30)
    assert again.scorer.rows() == []


@pytest.mark.parametrize("error", [EvaluationError("no finite value"), RuntimeError("")])
def test_a_failure_is_said_and_the_next_is_scored(training: Training, error: Exception) -> None:
    training.task.error = error
    training.pass_by(10)
    assert training.notes == [
        f"the FID at step 10 failed, training goes on: {str(error) or repr(error)}"
    ]
    training.task.error = None
    training.pass_by(20)
    assert [row["global_step"] for row in training.shown()] == [20]


def test_weights_that_are_not_finite_have_no_score(training: Training) -> None:
    model = make_network(training.config, 0)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    handover = WeightsHandover(training.storage, training.directory)
    handover.hand_over(10, model)
    handover.close()
    training.scorer.look()
    training.scorer.look()
    assert (
        "step 10 failed, training goes on: 64 of the samples 128 to 191 hold" in training.notes[0]
    )
    assert training.files("scores") == training.files("weights") == []


def test_storage_in_trouble_is_said_once_and_harms_nothing(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> Any:
        raise StorageError("it is full. Free space.")

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "list", refuse)
        training.hand_over(10)
        training.scorer.look()
        training.scorer.look()
    assert "no FID at step 10, training goes on: it is full" in caplog.text
    assert training.notes == ["no FID for now, training goes on: it is full. Free space."]
    training.pass_by(20)
    assert [row["global_step"] for row in training.shown()] == [20]


def test_the_end_waits_for_the_last_score_and_a_failure_for_none(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid_validation, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(fid_validation, "RayTask", lambda: training.task)
    with scores_beside(training.context) as scorer:
        assert scorer is not None
        training.hand_over(30)
    assert [row["global_step"] for row in scorer.rows()] == [30]
    assert training.notes[-1] == "2 of 3 FIDs that were due were not made: at step 10, 20"

    training.task.is_ready = False
    training.task.was_sent.clear()
    monkeypatch.setattr(fid_validation, "LONGEST_END_S", 0.0)
    with scores_beside(training.context):
        training.hand_over(20)
        assert training.task.was_sent.wait(timeout=30)
    assert training.task.is_cancelled
    assert "the FID at step 20 took too long and is left out" in training.notes
    assert training.files("weights") == []

    training.hand_over(10)
    with pytest.raises(DataError), scores_beside(training.context):
        raise DataError("x")
    assert [name[:9] for name in training.files("weights")] == ["000000010"]  # for the next


def test_nothing_is_scored_where_nobody_asks(training: Training) -> None:
    silent = training.config.train.model_copy(update={"fid_every": None})
    config = training.config.model_copy(update={"train": silent})
    with scores_beside(dataclasses.replace(training.context, config=config)) as scorer:
        assert scorer is None


def test_a_thin_reference_is_refused(tmp_path: Path, tiny_config: Path) -> None:
    message = (
        r"needs 10 x features\.width = 70 validation images as its reference, and there are 60"
        r".*lower features\.width, or leave out train\.fid_every\."
    )
    with pytest.raises(DataError, match=message):
        Training(tmp_path / "root", tiny_config, num_features=7)


def test_samples_fewer_than_the_width_needs_are_refused_when_it_is_known(
    tmp_path: Path, tiny_config: Path
) -> None:
    few = ("features.width=2", "train.fid_samples=39")  # as where the config does not say the width
    message = r"train\.fid_samples must be at least 10 x features\.width = 40, got 39"
    with pytest.raises(DataError, match=message):
        Training(tmp_path / "root", tiny_config, *few)


@pytest.mark.parametrize("hindrance", ["the storage fails", "the weights before are on their way"])
def test_a_score_of_other_weights_goes_though_there_was_a_hindrance(
    training: Training, monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    storage, directory = training.storage, training.directory
    storage.create(f"{directory}/scores/000000010-abandoned.json", b"{}")
    handover = WeightsHandover(storage, directory)
    model = make_network(training.config, 10)
    if hindrance == "the storage fails":
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "list", raise_error(StorageError("Away. Wait.")))
            handover.hand_over(10, model)
            handover._pool.submit(lambda: None).result()
    else:
        is_there = threading.Event()

        def wait() -> None:
            is_there.wait(60)

        handover._writing = handover._pool.submit(wait)
        handover.hand_over(10, model)
        is_there.set()
    assert training.files("scores") == ["000000010-abandoned.json"]
    handover.close()
    assert training.files("scores") == []


def test_weights_of_before_go_though_others_were_being_written_when_training_came_by(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    handover = WeightsHandover(training.storage, training.directory)
    handover.hand_over(10, make_network(training.config, 0))
    handover._pool.submit(lambda: None).result()
    assert [name[:9] for name in training.files("weights")] == ["000000010"]
    may_list, list_ = threading.Event(), LocalStorage.list
    monkeypatch.setattr(LocalStorage, "list", lambda *args: may_list.wait(60) and list_(*args))
    handover.hand_over(20, make_network(training.config, 0))
    handover.hand_over(10, make_network(training.config, 1))  # after a rewind
    may_list.set()
    handover.close()
    assert training.files("weights") == []  # those at step 20 found others waiting


def test_what_the_storage_refused_as_a_score_came_is_done_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.hand_over(10, seed=0)
    training.scorer.reach(10)
    training.scorer.look()
    found = training.task.result()
    training.hand_over(10, seed=1)  # training went back: the score to come is of other weights
    with monkeypatch.context() as patch:
        patch.setattr(training.task, "result", lambda: found)
        patch.setattr(LocalStorage, "exists", raise_error(StorageError("Away. Wait.")))
        training.scorer.look()
        patch.undo()
        patch.setattr(training.task, "result", lambda: found)
        assert len(training.files("scores")) == 1
        training.scorer.look()
    assert training.files("scores") == []
    training.scorer.look()
    assert [row["global_step"] for row in training.scorer.rows()] == [10]


def test_a_score_that_could_not_be_dropped_is_told(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handover = WeightsHandover(training.storage, training.directory)
    monkeypatch.setattr(LocalStorage, "list", raise_error(StorageError("Away. Wait.")))
    handover.hand_over(10, make_network(training.config, 10))
    handover.close()
    assert "The FID at step 10 may be of other weights: Away." in caplog.text


def test_what_a_file_browser_leaves_is_no_weights(training: Training) -> None:
    stray = [f"{training.directory}/{kind}/.DS_Store" for kind in ("weights", "scores")]
    for path in stray:
        training.storage.create(path, b"")
    training.scorer.begin(0)
    training.pass_by(10)
    assert [row["global_step"] for row in training.scorer.rows()] == [10]
    assert all(training.storage.exists(path) for path in stray)
    training.storage.create(f"{training.context.series_directory}/fid/.DS_Store", b"")
    assert [row["global_step"] for row in Scorer(training.context, training.task).rows()] == []


def raise_error(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_its_samples_come_after_those_of_the_final_score(training: Training) -> None:
    training.pass_by(10)
    (row,) = training.shown()
    config, inputs = training.config, training.context.inputs
    network = Network(make_network(config, 0), make_diffusion(config), None)
    extractor = load_extractor(training.storage, inputs["features"])
    drawn = iter_drawn(config, network, extractor, 72, config.evaluate.num_samples)
    found = sum_features(np.concatenate([features for _, features in drawn]))
    real = sum_features(read_features(training.storage, inputs["reference"], "validation"))
    assert row["value"] == pytest.approx(frechet_distance(real, found), rel=1e-6)


def test_its_labels_are_drawn_as_those_of_the_training_images(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"train": {"0": 1, "1": 5}, "validation": {"0": 9}, "test": {"0": 9}}
    counts: list[Any] = []

    def draw(config: Config, network: Network, *_: Any) -> Iterator[Any]:
        counts.append(network.counts)
        yield None, np.eye(4, dtype=np.float32)

    monkeypatch.setattr(
        fid_validation, "read_dataset", lambda *_: {"labels": labels, "classes": None}
    )
    monkeypatch.setattr(fid_validation, "iter_drawn", draw)
    told = training.config.model.model_copy(update={"class_conditional": True})
    config = training.config.model_copy(update={"model": told})
    training.storage.create("w", to_safetensors(make_unet(config, 0, 2).state_dict()))
    score_weights(training.storage.uri, config.model_dump_json(), training.context.inputs, "w")
    assert counts == [{0: 1, 1: 5}]
