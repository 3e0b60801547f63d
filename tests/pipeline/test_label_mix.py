"""The labels of samples: by the reference's data set, by name, and part of the protocol."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.label_mix import compare_classes, count_by_id, count_for_training, read_mix
from pipeline.protocol import differences
from pipeline.storage import LocalStorage
from pipeline.subjects import find_source, sampling_of
from pipeline.workflow import PlannedStep, Step, StepContext

CATS = {"cat": 30, "dog": 10}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


def write_data(storage: LocalStorage, key: str, train: dict[str, int]) -> dict[str, Any]:
    """A data set of these classes, with a manifest; only names and numbers of it."""
    classes = None if all(name.isdigit() for name in train) else sorted(train)
    labels = {"train": train, "validation": {}, "test": {}}
    text = json.dumps({"classes": classes, "labels": labels}).encode()
    storage.create(f"steps/preprocess/{key}/dataset.json", text)
    artifact = {"file": "dataset.json", "sha256": hashlib.sha256(text).hexdigest()}
    manifest = {"step": "preprocess", "key": key, "artifacts": {"dataset.json": artifact}}
    path = f"steps/preprocess/{key}/manifest.json"
    storage.create(path, json.dumps(manifest).encode())
    return manifest


def made_of(key: str) -> dict[str, Any]:
    """The manifest of a training, or a reference, that was made of a data set."""
    return {"key": f"of-{key}", "metrics": {}, "identity": {"inputs": {"preprocess": key}}}


@pytest.mark.parametrize("is_told", [True, False])
def test_a_shard_of_one_class_changes_no_sample_and_no_protocol(
    storage: LocalStorage, tiny_config: Path, is_told: bool
) -> None:
    config = load_config(tiny_config, [f"model.class_conditional={str(is_told).lower()}"])
    write_data(storage, "pinned", CATS)
    grown = write_data(storage, "grown", CATS | {"cat": 900})
    step = PlannedStep(Step("evaluate", 6, "", {}), "k", {}, "k", "run", "")

    def context(reference: str) -> StepContext:
        inputs = {
            "preprocess": grown,
            "train": made_of("grown"),
            "reference": made_of(reference),
        }
        return StepContext(config, storage, step, inputs, lambda event: None)

    pinned, own = context("pinned"), context("grown")
    assert find_source(pinned).counts == ({"0": 30, "1": 10} if is_told else None)
    assert find_source(own).counts == ({"0": 900, "1": 10} if is_told else None)
    differing = differences(sampling_of(pinned), sampling_of(own))
    assert differing == (["label_mix"] if is_told else [])
    assert ("label_mix" in sampling_of(pinned)) is is_told


def test_classes_go_by_name_and_those_of_no_sample_count_nothing(storage: LocalStorage) -> None:
    write_data(storage, "d", CATS)
    assert read_mix(storage, made_of("d")) == CATS
    assert count_by_id(CATS, ["ape", "cat", "dog"]) == {"0": 0, "1": 30, "2": 10}
    with pytest.raises(DataError, match="images of dog, which the network does not know"):
        count_by_id(CATS, ["cat"])


def test_a_network_is_not_told_of_a_data_set_with_other_classes(storage: LocalStorage) -> None:
    write_data(storage, "of-training", CATS)
    renamed = write_data(storage, "renamed", {"cat": 30, "cow": 10})
    with pytest.raises(DataError, match=r"other classes \(new: cow; gone: dog\)"):
        count_for_training(storage, made_of("of-training"), renamed, made_of("renamed"))


def test_a_class_that_the_champion_does_not_know_is_refused_with_its_shard(
    storage: LocalStorage,
) -> None:
    write_data(storage, "before", {"0": 5, "1": 5})
    now = write_data(storage, "now", {"0": 5, "1": 5, "2": 1})
    bringing = {"a.tar": ["0", "1"], "b.tar": ["1", "2"]}

    def check(start: dict[str, Any] | None, data: dict[str, Any], reference: str) -> None:
        compare_classes(storage, data, reference=made_of(reference), start=start, bringing=bringing)

    with pytest.raises(ConfigError, match=r"\(new: 2, brought by b\.tar\).* = \"scratch\", or"):
        check(made_of("before"), now, "before")
    check(None, now, "before")
    check(made_of("now"), now, "before")
    fewer = write_data(storage, "fewer", {"0": 5})
    with pytest.raises(ConfigError, match=r"\(gone: 1\)"):
        check(made_of("before"), fewer, "before")
    with pytest.raises(ConfigError, match="has samples of 1, of which there are no images now"):
        check(None, fewer, "before")


def test_as_many_classes_with_another_name_are_no_start(storage: LocalStorage) -> None:
    write_data(storage, "before", {"ant": 5, "bee": 5})
    now = write_data(storage, "now", {"ape": 5, "bee": 5})
    with pytest.raises(ConfigError, match=r"\(new: ape; gone: ant\)"):
        compare_classes(
            storage, now, reference=made_of("before"), start=made_of("before"), bringing={}
        )
