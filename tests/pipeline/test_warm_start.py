"""A training that begins with another one's weights."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints import Checkpoint, CheckpointStore, to_safetensors
from pipeline.config import load_config
from pipeline.driver import Basis, make_plan
from pipeline.errors import ConfigError, StorageError
from pipeline.lineage import find_parent, is_made_by
from pipeline.models import make_unet
from pipeline.settings import Config
from pipeline.steps import Start
from pipeline.storage import LocalStorage
from pipeline.train import _start_of, train_in_process
from pipeline.workflow import StepContext, hash_json


class Trainings:
    """Trainings in this process, on a few random images."""

    def __init__(self, config_path: Path, root: Path, write_data_set: Callable[..., Any]) -> None:
        self.path, self.storage = config_path, LocalStorage(str(root))
        rng = np.random.default_rng(0)
        pixels = np.stack([rng.integers(0, 256, (1, 8, 8), np.uint8) for _ in range(64)])
        self.data = write_data_set(self.storage, pixels)

    def config(self, *settings: str) -> Config:
        root = f"storage.root={self.storage.uri}"
        return load_config(self.path, [root, "train.checkpoint_every=4", *settings])

    def train(
        self, name: str, num_steps: int, start: dict[str, Any] | None = None, **settings: Any
    ) -> Checkpoint:
        wanted = [f"train.{key}={value}" for key, value in settings.items()]
        config = self.config(f"train.num_steps={num_steps}", *wanted)
        train_in_process(config, self.storage, name, self.data, start=start)
        checkpoint = CheckpointStore(self.storage, name).load(num_steps)
        assert checkpoint is not None
        return checkpoint

    def publish(self, key: str, ema: Any) -> dict[str, Any]:
        """The manifest of a training with these EMA weights."""
        content = to_safetensors(ema)
        sha256 = hashlib.sha256(content).hexdigest()
        artifact = {"file": "ema.safetensors", "bytes": len(content), "sha256": sha256}
        manifest = {"step": "train", "key": key, "artifacts": {"ema.safetensors": artifact}}
        self.storage.create(f"steps/train/{key}/ema.safetensors", content)
        self.storage.create(f"steps/train/{key}/manifest.json", json.dumps(manifest).encode())
        return manifest


@pytest.fixture
def trainings(tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., Any]) -> Trainings:
    return Trainings(tiny_config, tmp_path / "runs", write_data_set)


def test_it_begins_with_the_average_of_the_other(trainings: Trainings) -> None:
    other = trainings.train("other", 8, seed=1)
    start = trainings.publish("k", other.ema)
    begun = trainings.train("warm", 1, start, learning_rate=1e-12)
    for weights in (begun.model, begun.ema):
        assert all(torch.allclose(weights[n], other.ema[n], atol=1e-9) for n in other.ema)
    fresh = trainings.train("fresh", 1, learning_rate=1e-12)
    assert not all(torch.allclose(fresh.ema[n], other.ema[n], atol=1e-9) for n in other.ema)


def test_resumed_it_equals_the_uninterrupted_one_to_the_bit(trainings: Trainings) -> None:
    start = trainings.publish("k", trainings.train("other", 4, seed=1).ema)
    whole = trainings.train("whole", 8, start)
    trainings.train("parts", 4, start)
    parts = trainings.train("parts", 8, start)
    assert all(torch.equal(whole.model[n], parts.model[n]) for n in whole.model)
    assert all(torch.equal(whole.ema[n], parts.ema[n]) for n in whole.ema)


def test_another_network_is_named(trainings: Trainings) -> None:
    wide = make_unet(trainings.config("model.dim=16"), 0)
    start = trainings.publish("k", wide.state_dict())
    with pytest.raises(ConfigError, match=r'steps/train/k has another network.*start = "scratch"'):
        trainings.train("warm", 1, start)


def context(trainings: Trainings, start: Start | None) -> StepContext:
    """Of the step `train` as a cycle plans it."""
    config = trainings.config()
    steps = make_plan(config, ("train",), basis=Basis({}, start)).steps
    (planned,) = (p for p in steps if p.step.name == "train")
    return StepContext(config, trainings.storage, planned, {}, observer=lambda event: None)


def test_the_step_finds_the_training_that_its_key_names(trainings: Trainings) -> None:
    manifest = trainings.publish("k", {"w": torch.zeros(1)})
    assert _start_of(context(trainings, None)) == "null"
    assert json.loads(_start_of(context(trainings, Start("k", "w")))) == manifest
    with pytest.raises(StorageError, match="steps/train/gone is gone, whose weights"):
        _start_of(context(trainings, Start("gone", "w")))


def test_the_parent_is_whose_weights_it_began_with_unless_it_continues_another() -> None:
    def version(number: int, train: str, series: str, steps: int) -> dict[str, Any]:
        checkpoint = {"series": series, "global_step": steps}
        return {"number": number, "lineage": {"train": train}, "checkpoint": checkpoint}

    versions = [version(1, "a", "s", 100), version(2, "a", "s", 100), version(3, "b", "t", 50)]
    versions.append(version(4, "c", "t", 20))
    warm = {"series": "u", "global_step": 10}
    assert find_parent(warm, versions) is None
    assert find_parent(warm, versions, "a") == 2  # scored twice
    assert find_parent(warm, versions, "gone") is None
    longer = {"series": "t", "global_step": 60}
    assert find_parent(longer, versions, "a") == 3  # the longest before it


def test_a_version_is_of_the_run_that_trained_and_scored_it() -> None:
    identities = {"train": {"settings": 1}, "evaluate": {"settings": 2}}
    made = {"lineage": {step: hash_json(identity) for step, identity in identities.items()}}
    assert is_made_by(made, identities)
    for step in identities:  # trained alike and scored otherwise, or the other way round
        assert not is_made_by(made, identities | {step: {"settings": 3}})
        assert not is_made_by(made, {step: identities[step]})
