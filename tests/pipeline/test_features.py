"""The feature space of the score and real images in it, from a local root and a remote one."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import features as features_step
from pipeline import reference as reference_step
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.dataset import open_split
from pipeline.dataset_document import make_document
from pipeline.driver import make_plan
from pipeline.errors import DataError, EvaluationError
from pipeline.extractors import ARTIFACT, extract, load_extractor
from pipeline.extractors.classifier import train_classifier
from pipeline.feature_cache import FeatureCache, FeatureFile, make_features
from pipeline.features import make_extractor
from pipeline.reference import (
    group_files,
    iter_features,
    measure_reference,
    pick_features,
    read_features,
    read_sums,
)
from pipeline.scores.frechet import sum_features
from pipeline.settings import Config
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage, Storage, open_storage
from pipeline.units import SPLITS, read_units
from pipeline.workflow import StepContext

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
OWN = """
import torch
from torch import nn

class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 3))

    def forward(self, images):
        return images.flatten(1).float() / 255 @ self.weight
"""


def preprocess(config: Config, storage: Storage, key: str = "k") -> dict[str, Any]:
    """The committed digits below a root; the manifest of the data set."""
    shards = list_inputs(config.data, storage).shards
    for shard in shards:
        preprocess_shard(shard, config.data, storage)
    units = read_units(storage, shards, config.data)
    document = make_document(config.data, storage, shards, units, [])
    text = json.dumps(document).encode()
    storage.create(f"steps/preprocess/{key}/dataset.json", text)
    artifact = {"file": "dataset.json", "sha256": hashlib.sha256(text).hexdigest()}
    return {
        "step": "preprocess",
        "key": key,
        "artifacts": {"dataset.json": artifact},
        "metrics": {
            "counts": document["counts"], "labels": document["labels"]["train"],
            "unlabelled": document["unlabelled"]["train"],
        },
    }  # fmt: skip


def run_step(
    step: str, function: Any, config: Config, storage: Storage, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """What the workflow does with a step that is planned; its manifest."""
    planned = next(p for p in make_plan(config).steps if p.step.name == step)
    context = StepContext(config, storage, planned, inputs, lambda event: None)
    metrics = function(context)
    return {
        "step": step, "key": planned.key, "artifacts": context.artifacts, "metrics": metrics
    }  # fmt: skip


def read(storage: Storage, manifest: Mapping[str, Any], name: str) -> bytes:
    return storage.read(
        f"steps/{manifest['step']}/{manifest['key']}/{manifest['artifacts'][name]['file']}"
    )


@pytest.fixture(autouse=True)
def forwarded(monkeypatch: Any) -> list[int]:
    """Runs in this process what Ray would run elsewhere; the images that tasks forward."""
    counts: list[int] = []

    def send(function: Any, resources: Any, *args: Any) -> Any:
        return function(*args)

    def run(context: StepContext, cache: FeatureCache, missing: Sequence[FeatureFile]) -> None:
        counts.append(sum(file.count for file in missing))
        features, cache_bytes = context.inputs["features"], context.config.data.cache_bytes
        for group in group_files(missing, 2):
            make_features(context.storage.uri, features, group, cache_bytes)

    monkeypatch.setattr(features_step, "send_task", send)
    monkeypatch.setattr(reference_step, "_run_tasks", run)
    return counts


@pytest.fixture
def own_config(tmp_path: Path, tiny_config: Path, monkeypatch: Any) -> Callable[..., Config]:
    """A config with a user's extractor, over some of the committed shards."""
    (tmp_path / "projection_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(*names: str) -> Config:
        sources = json.dumps([str(DIGITS / name) for name in names])
        settings = ["features.extractor=projection_of_a_test:Projection", "features.width=3"]
        settings += [f"data.sources={sources}", f"storage.root={tmp_path / 'root'}"]
        return load_config(tiny_config, settings)

    return make


def test_a_changed_shard_is_all_that_is_forwarded_again(
    own_config: Callable[..., Config], tmp_path: Path, forwarded: list[int]
) -> None:
    storage = LocalStorage(str(tmp_path / "root"))
    first = own_config("digits-0000.tar", "digits-0001.tar")
    second = own_config("digits-0000.tar", "digits-0002.tar")
    found, manifests = [], []
    for key, config in (("1", first), ("2", second), ("3", first)):
        data = preprocess(config, storage, key)
        features = run_step("features", make_extractor, config, storage, {"preprocess": data})
        manifests.append(features)
        inputs = {"preprocess": data, "features": features}
        found.append(run_step("reference", measure_reference, config, storage, inputs))
        assert found[-1]["metrics"]["counts"] == data["metrics"]["counts"]
    assert {m["key"] for m in manifests} == {manifests[0]["key"]}  # not keyed by the data
    counts = [found[k]["metrics"]["forwarded"] for k in range(3)]
    assert counts[0] == sum(found[0]["metrics"]["counts"].values())
    assert 0 < counts[1] < sum(found[1]["metrics"]["counts"].values())
    of_the_new = list_inputs(own_config("digits-0002.tar").data, storage).shards
    units = read_units(storage, of_the_new, second.data)
    assert counts[1] == sum(unit["splits"][s]["count"] for unit in units for s in SPLITS)
    assert counts[2] == 0
    assert forwarded == counts[:2]
    assert found[0]["artifacts"] == found[2]["artifacts"]  # by hash


@pytest.mark.parametrize("part_bytes", [1, 1 << 28])
def test_the_reference_holds_each_split_in_the_order_of_its_items(
    own_config: Callable[..., Config], tmp_path: Path, monkeypatch: Any, part_bytes: int
) -> None:
    monkeypatch.setattr(reference_step, "PART_BYTES", part_bytes)
    config = own_config("digits-000[01].tar")
    settings = config.data.model_copy(update={"drop_duplicates": True})
    config = config.model_copy(update={"data": settings})
    storage = LocalStorage(str(tmp_path / "root"))
    data = preprocess(config, storage)
    features = run_step("features", make_extractor, config, storage, {"preprocess": data})
    inputs = {"preprocess": data, "features": features}
    reference = run_step("reference", measure_reference, config, storage, inputs)
    extractor = load_extractor(storage, features)
    sums = read(storage, reference, "sums.safetensors")
    for split in SPLITS:
        items = open_split(storage, data, split)
        expected = extract(extractor, items.gather(np.arange(len(items))))
        parts = [len(part) for part in iter_features(storage, reference, split)]
        assert parts == (list(items.counts) if part_bytes == 1 else [len(items)])
        features_of_split = read_features(storage, reference, split)
        assert np.allclose(features_of_split, expected, atol=1e-5)
        numbers = np.random.default_rng(0).permutation(len(items))[: len(items) // 2]
        picked = pick_features(storage, reference, split, numbers)
        assert np.array_equal(picked, features_of_split[numbers])
        whole, found = sum_features(features_of_split), read_sums(sums, split)
        assert found.count == whole.count == data["metrics"]["counts"][split]
        assert found.total == pytest.approx(whole.total, rel=1e-12)
        assert found.outer == pytest.approx(whole.outer, rel=1e-12)


def test_excluded_twins_are_left_out_and_run_nothing(
    own_config: Callable[..., Config], tmp_path: Path, make_tar: Any, make_png: Any
) -> None:
    members = [(f"{k:03d}.png", make_png(k % 60)) for k in range(160)]  # 60 images, 100 twins
    make_tar(tmp_path / "twins.tar", members)
    storage = LocalStorage(str(tmp_path / "root"))
    counts = []
    for key, drops in (("all", False), ("once", True)):
        config = own_config(str(tmp_path / "twins.tar"))
        data_settings = config.data.model_copy(update={"drop_duplicates": drops})
        few = config.evaluate.model_copy(update={"num_samples": 30})
        config = config.model_copy(update={"data": data_settings, "evaluate": few})
        data = preprocess(config, storage, key)
        data["metrics"]["counts"] = dict(data["metrics"]["counts"], test=1000)  # enough of them
        features = run_step("features", make_extractor, config, storage, {"preprocess": data})
        inputs = {"preprocess": data, "features": features}
        metrics = run_step("reference", measure_reference, config, storage, inputs)["metrics"]
        counts.append((sum(metrics["counts"].values()), metrics["forwarded"]))
    assert counts == [(160, 160), (60, 0)]


def test_a_poor_classifier_is_refused_and_not_kept(tiny_config: Path, tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "root"))
    given = [f"storage.root={storage.uri}", "features.batch_size=32"]
    config = load_config(tiny_config, [*given, "features.num_steps=3"])
    data = preprocess(config, storage)
    with pytest.raises(EvaluationError, match=r"The extractor classifier is right for .* needed"):
        run_step("features", make_extractor, config, storage, {"preprocess": data})
    assert storage.list("steps/features") == []


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": 100, "test": 99}, "as there are samples, 128, and there are 100"),
        ({"train": 999, "test": 39}, "needs 10 x features.width = 40 test images"),
    ],
)
def test_too_few_images_are_said_before_an_extractor_is_made(
    tiny_config: Path, tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    config = load_config(tiny_config, [f"storage.root={tmp_path / 'root'}"])
    data = {"metrics": {"counts": counts, "labels": {"0": 1, "1": 1}, "unlabelled": 0}}
    with pytest.raises(DataError, match=message):
        run_step(
            "features", make_extractor, config, LocalStorage(str(tmp_path)), {"preprocess": data}
        )


def test_tasks_are_even_and_hold_every_file_once() -> None:
    sizes = [50, 1, 1, 1, 30, 20, 10, 7]
    files = [FeatureFile("train", f"{k}", f"{k}", size, 1) for k, size in enumerate(sizes)]
    groups = group_files(files, num_cpus=1)
    assert sorted(sum(file.num_bytes for file in group) for group in groups) == [60, 60]
    assert sorted(file.path for group in groups for file in group) == [str(k) for k in range(8)]
    assert len(group_files(files[:1], num_cpus=4)) == 1
    large = [replace(file, num_bytes=1 << 25) for file in files]
    assert [len(group) for group in group_files(large, num_cpus=1)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("window", "cache_bytes"),
    [([], 150_000), (["data.shuffle_window=100"], 80_000)],  # the training split has 100,000
)
def test_the_classifier_is_the_same_from_a_remote_root(
    object_store: Any,
    tmp_path: Path,
    tiny_config: Path,
    monkeypatch: Any,
    window: list[str],
    cache_bytes: int,
) -> None:
    monkeypatch.setenv("RAYDIFFUSION_CACHE", str(tmp_path / "cache"))
    _, bucket = object_store
    settings = ["features.num_steps=6", "features.batch_size=12", *window]
    settings.append(f"data.cache_bytes={cache_bytes}")
    found = []
    for root in (str(tmp_path / "root"), f"s3://{bucket}/root"):
        config = load_config(tiny_config, [*settings, f"storage.root={root}"])
        storage = open_storage(root)
        data = preprocess(config, storage)
        facts = train_classifier(
            storage.uri, data, config.features.model_dump_json(), config.data.model_dump_json()
        )
        weights = facts.pop("weights")
        artifact = {"file": "w", "sha256": hashlib.sha256(weights).hexdigest()}
        storage.create("steps/features/k/w", weights)
        manifest = {
            "step": "features", "key": "k", "artifacts": {ARTIFACT: artifact}, "metrics": facts
        }  # fmt: skip
        inputs = {"preprocess": data, "features": manifest}
        reference = run_step("reference", measure_reference, config, storage, inputs)
        hashes = {name: a["sha256"] for name, a in reference["artifacts"].items()}
        found.append((weights, facts, reference["metrics"], hashes))
    assert found[0] == found[1]
    assert found[0][1]["num_classes"] == 10
    assert 0 < found[0][1]["train_accuracy"] < 1
    assert found[0][2]["forwarded"] == sum(found[0][2]["counts"].values()) > 1000
