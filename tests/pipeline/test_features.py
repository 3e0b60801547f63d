"""The feature space of the score, made from a local root and from a remote one."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.dataset import make_document
from pipeline.features import _count_classes, _extract_splits, _train_classifier
from pipeline.settings import Config
from pipeline.sources import list_inputs
from pipeline.storage import Storage, open_storage
from pipeline.units import read_units


def preprocess(config: Config, storage: Storage) -> dict[str, Any]:
    """The committed digits below a root; the manifest of the data set."""
    shards = list_inputs(config.data, storage).shards
    for shard in shards:
        preprocess_shard(shard, config.data, storage)
    units = read_units(storage, shards, config.data)
    document = make_document(config.data, storage, shards, units, [])
    text = json.dumps(document).encode()
    storage.create("steps/preprocess/k/dataset.json", text)
    artifact = {"file": "dataset.json", "sha256": hashlib.sha256(text).hexdigest()}
    return {"step": "preprocess", "key": "k", "artifacts": {"dataset.json": artifact}}


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
    config = load_config(tiny_config, [*settings, f"data.cache_bytes={cache_bytes}"])
    found = []
    for root in (str(tmp_path / "root"), f"s3://{bucket}/root"):
        storage = open_storage(root)
        data = preprocess(config, storage)
        features = _train_classifier(
            storage.uri, data, config.features.model_dump_json(), config.data.model_dump_json()
        )
        weights = features.pop("weights")
        artifact = {"file": "w", "sha256": hashlib.sha256(weights).hexdigest()}
        storage.create("steps/features/k/w", weights)
        manifest = {
            "step": "features",
            "key": "k",
            "artifacts": {"classifier.safetensors": artifact},
            "metrics": features,
        }
        found.append((weights, features, _extract_splits(root, data, manifest, cache_bytes)))
    assert found[0] == found[1]
    assert found[0][1]["num_classes"] == 10
    assert 0 < found[0][1]["train_accuracy"] < 1
    assert sum(found[0][2][1].values()) > 1000


def test_classes_are_counted_by_what_is_trained_on_and_chosen_by() -> None:
    labels: dict[str, Any] = {"train": {"0": 3, "4": 1}, "validation": {"6": 1}, "test": {"9": 2}}
    assert _count_classes({"labels": labels, "classes": None}) == 7
    names = {"train": {"cat": 3}, "validation": {"dog": 1}, "test": {"eel": 2}}
    assert _count_classes({"labels": names, "classes": ["cat", "dog", "eel"]}) == 2
