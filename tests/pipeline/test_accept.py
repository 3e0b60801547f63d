"""`accept-reference`: the champion's score first, the pin last; the work is in the story."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import rescore
from pipeline.accept import Accepted, accept_reference, config_of_champion
from pipeline.config import load_config
from pipeline.driver import Basis
from pipeline.errors import ConfigError, StorageError
from pipeline.holding import add_finding
from pipeline.lots import Lot
from pipeline.pinning import find_score, pin_first
from pipeline.registry import Registry
from pipeline.settings import ClusterConfig, Config
from pipeline.storage import LocalStorage

KEYS = {name: f"{name}-1" for name in ("preprocess", "features", "reference", "train", "evaluate")}


def score(reference: str) -> dict[str, Any]:
    facts = {"reference_split": "test", "reference_count": 9, "extractor": "x"}
    protocol = {"reference": reference, "extractor_sha256": "h", "feature_width": 4, **facts}
    return {"metric": "fid[x]", "value": 9.0, "protocol": protocol}


class Model:
    """A model with a champion, whose work is done at once and under another reference."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = config
        self.registry = Registry(LocalStorage(config.storage.root), "tiny")
        self.planned: list[tuple[Config, Basis]] = []
        self.notes: list[str] = []
        self.keys = {**KEYS, "preprocess": "preprocess-2", "reference": "reference-2"}
        self.keys["evaluate"] = "evaluate-2"
        self.settings: dict[str, Any] = {}  # of the score
        self.while_scoring: Callable[[], Any] = lambda: None
        monkeypatch.setattr(rescore, "bring_about", self._bring_about)
        manifest = b'{"key": "train-1"}'
        self.registry.storage.create("steps/train/train-1/manifest.json", manifest)
        self.champion = config.model_copy(
            update={"train": config.train.model_copy(update={"seed": 7})}
        )
        self.add_version("a")

    def add_version(self, key: str, **more: Any) -> None:
        self.registry.add_version(
            {
                "key": key,
                "lineage": KEYS,
                "score": score("reference-1"),
                "config": self.champion.model_dump(mode="json"),
                **more,
            }
        )

    def accept(self) -> Accepted:
        def observe(event: Any) -> None:
            self.notes.append(event.fields["text"])

        return accept_reference(self.config, observer=observe, reason="new pens")

    def _bring_about(
        self, config: Config, targets: Any, *, basis: Basis, **_: Any
    ) -> dict[str, dict[str, Any]]:
        assert targets == ("evaluate",)
        self.planned.append((config, basis))
        made: dict[str, dict[str, Any]] = {name: {"key": k} for name, k in self.keys.items()}
        made["evaluate"]["metrics"] = score(self.keys["reference"])
        made["evaluate"]["metrics"]["protocol"] |= self.settings
        self.while_scoring()
        return made


@pytest.fixture
def model(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    config = load_config(tiny_config, [f"storage.root={tmp_path / 'runs'}"])
    return Model(config, monkeypatch)


def test_another_evaluation_is_pinned_and_the_champion_scored(model: Model) -> None:
    model.registry.promote(1, "the first")
    accepted = model.accept()
    assert (accepted.is_new, accepted.evaluation["number"], accepted.version) == (True, 2, 1)
    first, second = model.registry.evaluations()
    assert (first["reference"], first["data"]) == ("reference-1", "preprocess-1")
    assert (second["reference"], second["data"]) == ("reference-2", "preprocess-2")
    assert (second["reason"], bool(second["by"]), bool(second["time"])) == ("new pens", True, True)
    found = find_score(model.registry, model.registry.version(1), score("reference-2")["protocol"])
    assert found == accepted.score
    ((config, basis),) = model.planned
    assert config.train.seed == 7  # what belongs to the weights is the champion's
    assert basis.pinned == {"train": {"key": "train-1"}}


def test_accepted_again_nothing_changes(model: Model) -> None:
    model.registry.promote(1, "the first")
    first = model.accept()
    again = model.accept()
    assert (again.is_new, again.evaluation) == (False, first.evaluation)
    assert len(model.registry.evaluations()) == 2
    assert len(model.registry.records("scores")) == 1


def test_the_reference_that_is_pinned_needs_no_other_score(model: Model) -> None:
    model.registry.promote(1, "the first")
    model.keys = dict(KEYS)
    assert not model.accept().is_new
    assert model.registry.records("scores") == []
    assert len(model.registry.evaluations()) == 1


def test_other_settings_of_the_score_are_another_evaluation(model: Model) -> None:
    model.registry.promote(1, "the first")
    model.keys = {**KEYS, "evaluate": "evaluate-2"}
    model.settings = {"implementation": "another"}  # which no one has chosen
    assert not model.accept().is_new
    model.keys["evaluate"] = "evaluate-3"
    model.settings = {"num_steps": 20}
    assert model.accept().evaluation["number"] == 2
    assert model.registry.evaluations()[1]["protocol"]["num_steps"] == 20
    assert not model.accept().is_new


def test_who_is_promoted_meanwhile_is_scored_before_the_pin(model: Model) -> None:
    model.add_version("b")
    model.registry.promote(1, "the first")
    model.while_scoring = lambda: model.registry.promote(2, "a person's")
    accepted = model.accept()
    assert (accepted.version, accepted.is_new) == (2, True)
    assert [record["version"] for record in model.registry.records("scores")] == [1, 2]


def test_a_champion_is_not_scored_on_images_that_it_was_trained_on(model: Model) -> None:
    model.registry.promote(1, "the first")
    data = model.config.data.model_copy(update={"test_fraction": 0.4})
    model.config = model.config.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"version 1 held out 0\.3333 in all\. Lower"):
        model.accept()
    # Trained with more held out, but from the first one's weights.
    model.champion = model.champion.model_copy(update={"data": data})
    model.add_version("b", parent=1)
    model.registry.promote(2, "by hand")
    with pytest.raises(ConfigError, match=r"Version 2, the champion .* version 1 held out 0"):
        model.accept()
    assert model.planned == []
    model.add_version("c", parent=None)
    model.registry.promote(3, "by hand")
    assert model.accept().is_new


def test_killed_before_the_pin_the_old_one_holds(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.registry.promote(1, "the first")
    pin_first(model.registry)

    def fail(*_: Any) -> None:
        raise StorageError("It is away. Wait.")

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "add_record", fail)
        with pytest.raises(StorageError):
            model.accept()
    assert len(model.registry.evaluations()) == 1
    assert model.accept().evaluation["number"] == 2
    assert len(model.registry.records("scores")) == 1


def test_a_model_without_a_champion_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="no champion to be scored again"):
        model.accept()
    with pytest.raises(ConfigError, match="The model tiny has no champion"):
        config_of_champion(model.registry.storage, "tiny")


def test_what_is_held_takes_no_part(model: Model) -> None:
    model.registry.promote(1, "the first")
    known, held, taken, passed, loose, used = (letter * 64 for letter in "abcdef")
    shards = {"identity": {"settings": {"shards": {"k.tar": known}}}}
    document = json.dumps({"inputs": [{"files": [{"sha256": used}]}]}).encode()
    artifact = {"file": "dataset.json", "sha256": hashlib.sha256(document).hexdigest()}
    manifest = {"step": "preprocess", "key": "preprocess-1", **shards}
    text = json.dumps(manifest | {"artifacts": {"dataset.json": artifact}})
    directory = "steps/preprocess/preprocess-1"
    model.registry.storage.create(f"{directory}/manifest.json", text.encode())
    model.registry.storage.create(f"{directory}/dataset.json", document)
    of_files = Lot("loose-x", "9" * 64, (), {"a.png": loose, "b.png": used})
    lots = [Lot(f"{s[0]}.tar", s, ()) for s in (known, held, taken, passed)]
    for lot in (*lots, of_files):
        add_finding(model.registry, lot, "held", "far", evaluation=1, cycle=1)
    model.registry.create("released", taken, {"sha256": taken})
    add_finding(model.registry, lots[3], "passed", "near", evaluation=1, cycle=2)
    model.accept()
    ((config, _),) = model.planned
    assert config.data.leave_out == (held, loose)
    assert model.notes == [
        "held shards take no part: b.tar, loose-x. `retrain --accept-held SHARD` takes one in"
    ]


def test_the_champions_config_is_found_by_name(model: Model) -> None:
    model.registry.promote(1, "the first")
    config = config_of_champion(model.registry.storage, "tiny")
    assert config.train.seed == 7
    assert config.storage.root == model.registry.storage.uri


def test_a_champion_that_a_job_made_is_not_looked_for_on_its_cluster(
    model: Model, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ClusterConfig(address="10.0.0.1:6379", num_cpus=2)
    inception = ["features.extractor=inception", "features.width=64", "evaluate.num_samples=640"]
    weights = "features.weights=/tmp/ray/session/w.pt"
    config = load_config(tiny_config, [*inception, weights, "train.seed=7"])
    model.champion = config.model_copy(update={"cluster": there})
    model.add_version("b")
    model.registry.promote(2, "of a job")
    storage = model.registry.storage
    assert model.registry.version(2)["config"]["cluster"]["address"] == there.address
    assert config_of_champion(storage, "tiny").cluster == ClusterConfig()
    monkeypatch.chdir(tmp_path)
    given = ["cluster.address=10.0.0.2:6379", "features.weights=w.pt"]
    config = config_of_champion(storage, "tiny", given)
    assert config.cluster == ClusterConfig(address="10.0.0.2:6379")
    assert config.features.weights == str(tmp_path / "w.pt")
    assert config.train.seed == 7
    with pytest.raises(ConfigError, match=r"^--set train\.seed cannot be set for a model's name"):
        config_of_champion(storage, "tiny", [*given, "train.seed=8"])
