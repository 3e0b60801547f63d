"""What could not be compared: refused, or a champion scored, before anything is trained."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import comparable, rescore
from pipeline.driver import Basis, Plan, make_plan
from pipeline.errors import ConfigError, StorageError
from pipeline.label_mix import mix_protocol
from pipeline.pinning import pin_first
from pipeline.registry import Registry
from pipeline.settings import Config

from .test_retrain import Model


@pytest.fixture
def model(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model(tiny_config, tmp_path / "runs", monkeypatch)
    made.make_version()
    made.hold()
    return made


def test_more_images_may_be_held_out(model: Model) -> None:
    assert model.retrain(model.config("data.test_fraction=0.1", shards=(0, 1))).number == 1
    assert model.retrain(model.config("data.test_fraction=0.5", shards=(0, 1))).number == 2


def test_a_champion_that_was_trained_on_the_pinned_test_images_is_refused(model: Model) -> None:
    pin_first(model.registry)
    model.make_version(2, "data.test_fraction=0.05")
    with pytest.raises(ConfigError, match=r"Version 2, the champion of tiny, was trained on test"):
        model.retrain(model.config(shards=(0, 1)))


def test_without_a_champion_the_data_must_be_those_of_the_evaluation(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "champion", lambda self: None)
    with pytest.raises(ConfigError, match=r"data\.fit\. Set these back, or give the model another"):
        model.retrain(model.config("data.fit=pad", shards=(0, 1)))
    assert model.retrain(model.config("evaluate.num_steps=5", shards=(0, 1))).number == 1


class Scoring:
    """Scores are made at once, under the protocol that is asked for; and what was asked."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.planned = model, list[Plan]()
        self.fault: Exception | None = None
        monkeypatch.setattr(rescore, "bring_about", self._bring_about)

    def _bring_about(
        self, config: Config, targets: Any, *, basis: Basis, subject: Any = None, **_: Any
    ) -> dict[str, Any]:
        assert len(self.model.ran) == 0  # before anything is trained
        planned = make_plan(config, targets, basis=basis, subject=subject)
        self.planned.append(planned)
        if self.fault is not None:
            raise self.fault
        score = {"metric": "fid[classifier]", "value": 8.0, "protocol": self.model.protocol}
        return {"evaluate": {"key": planned.steps[-1].key, "metrics": score}}


@pytest.mark.parametrize(
    "protocol", [{"reference": "other", "reference_count": 7}, {"implementation": "torchmetrics 0"}]
)
def test_a_champion_without_a_score_gets_it_first(
    model: Model, monkeypatch: pytest.MonkeyPatch, protocol: dict[str, Any]
) -> None:
    pin_first(model.registry)
    model.make_version(2, **protocol)
    scoring = Scoring(model, monkeypatch)
    scoring.fault = StorageError("It is away. Wait.")
    config = model.config(shards=(0, 1))
    with pytest.raises(StorageError):
        model.retrain(config)
    assert model.ran == []
    scoring.fault = None
    assert model.retrain(config).number == 1  # the same cycle goes on
    assert len(scoring.planned) == 2
    evaluate = scoring.planned[-1].steps[-1]
    assert evaluate.identity["inputs"] == {
        "preprocess": "preprocess-2", "features": "f", "reference": "r", "train": "train-2",
    }  # fmt: skip
    assert evaluate.identity["settings"]["program"] == {
        name: model.protocol[name] for name in ("implementation", "scoring")
    }
    (later,) = model.registry.records("scores")
    assert (later["version"], later["score"]["value"]) == (2, 8.0)
    assert any("has no score under evaluation 1, and gets it first" in n for n in model.notes)
    assert len(model.registry.evaluations()) == 1  # the judge stays
    assert model.retrain(model.config(shards=(0, 1, 2))).number == 2
    assert len(scoring.planned) == 2  # it has its score


def test_settings_that_are_not_the_pinned_ones_score_no_champion(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_first(model.registry)
    model.make_version(2, reference="other")
    scoring = Scoring(model, monkeypatch)
    with pytest.raises(ConfigError, match="they differ in num_steps"):
        model.retrain(model.config("evaluate.num_steps=5", shards=(0, 1)))
    assert scoring.planned == []


def test_another_class_is_refused_before_anything_is_trained(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "model.class_conditional=true"
    model = Model(tiny_config, tmp_path / "runs", monkeypatch)
    model.make_version(1, told)
    model.hold()

    def data_set(key: str, num_classes: int) -> dict[str, Any]:
        labels = {str(k): 9 for k in range(num_classes)}
        splits = dict.fromkeys(("train", "validation", "test"), labels)
        text = json.dumps({"classes": None, "labels": splits}).encode()
        model.storage.create(f"steps/preprocess/{key}/dataset.json", text)
        artifact = {"file": "dataset.json", "sha256": hashlib.sha256(text).hexdigest()}
        return {"step": "preprocess", "key": key, "artifacts": {"dataset.json": artifact}}

    path = "steps/preprocess/preprocess-1/manifest.json"
    before = json.loads(model.storage.read(path)) | data_set("preprocess-1", 2)
    model.storage.delete(path)
    model.storage.create(path, json.dumps(before).encode())
    made = {"preprocess": data_set("preprocess-2", 3)}
    monkeypatch.setattr(comparable, "bring_about", lambda *_, **__: made)
    unit = {"splits": {"train": {"labels": {"1": 5, "2": 1}}}}
    monkeypatch.setattr(
        comparable, "read_units", lambda storage, shards, data: [unit] * len(shards)
    )
    Scoring(model, monkeypatch)
    with pytest.raises(ConfigError, match=r"\(new: 2, brought by digits-0001\.tar\)"):
        model.retrain(model.config(told, shards=(0, 1)))
    assert model.ran == []
    model.protocol |= mix_protocol({"0": 9, "1": 9})  # its own had none
    scratch = model.retrain(model.config(told, "retrain.start=scratch", shards=(0, 1)))
    assert scratch.number == 2
    ((_, basis),) = model.ran
    assert basis is not None
    assert basis.start is None
