"""Features by Arrow file: made once, checked when they are read."""

import hashlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from pipeline import extractor_identity
from pipeline.errors import EvaluationError, StorageError
from pipeline.extractors import own
from pipeline.extractors.own import make_own
from pipeline.feature_cache import FeatureCache, FeatureFile, list_files, make_features
from pipeline.storage import LocalStorage, Storage, open_storage

CACHE_BYTES = 1 << 20


class Mean(nn.Module):
    """A user's extractor that counts what it is shown."""

    seen: ClassVar[list[int]] = []
    offset = 0.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        flat = images.flatten(1).float()
        return torch.stack([flat.mean(1), flat.amax(1)], 1) + self.offset


@pytest.fixture
def features(monkeypatch: Any) -> Iterator[dict[str, Any]]:
    """The manifest of the step `features` of a user's extractor, without its weights."""
    module = types.ModuleType("counting_of_a_test")
    module.make = Mean  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for place in (own, extractor_identity):
        monkeypatch.setattr(place, "hash_code", lambda extractor: "c")
    facts = make_own("counting_of_a_test:make", (1, 4, 4), None, None, 0)
    facts.pop("weights")
    Mean.seen.clear()
    artifact = {"file": "w", "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    yield {
        "step": "features",
        "key": "k",
        "metrics": facts,
        "artifacts": {"extractor.safetensors": artifact},
    }
    Mean.offset = 0.0


WEIGHTS = safetensors.numpy.save({})
IMAGES = np.random.default_rng(0).integers(0, 256, (700, 1, 4, 4), np.uint8)


def prepare(
    storage: Storage, write: Callable[..., Any], images: np.ndarray = IMAGES
) -> list[FeatureFile]:
    """A data set of three shards for training and one held out; its files."""
    storage.create("steps/features/k/w", WEIGHTS)
    manifest = write(storage, images, num_validation=100, num_shards=3)
    path = f"steps/preprocess/k/{manifest['artifacts']['dataset.json']['file']}"
    return list_files(json.loads(storage.read(path)))


@pytest.mark.parametrize("is_remote", [False, True])
def test_every_row_is_forwarded_once_for_any_number_of_references(
    features: dict[str, Any],
    write_data_set: Callable[..., Any],
    object_store: Any,
    tmp_path: Path,
    monkeypatch: Any,
    is_remote: bool,
) -> None:
    monkeypatch.setenv("RAYDIFFUSION_CACHE", str(tmp_path / "cache"))
    root = f"s3://{object_store[1]}/root" if is_remote else str(tmp_path / "root")
    storage = open_storage(root)
    files = prepare(storage, write_data_set)
    assert [(file.split, file.count) for file in files] == [
        ("train", 200), ("train", 200), ("train", 200), ("validation", 100)
    ]  # fmt: skip
    make_features(storage.uri, features, files[:2], CACHE_BYTES)
    assert sum(Mean.seen) == 400
    make_features(storage.uri, features, files, CACHE_BYTES)
    make_features(storage.uri, features, files, CACHE_BYTES)
    assert sum(Mean.seen) == 700
    cache = FeatureCache(storage, features)
    assert cache.names() == {file.sha256 for file in files}
    found = [cache.read(file) for file in files]
    flat = IMAGES.reshape(700, -1)
    expected = np.stack([flat.mean(1), flat.max(1)], 1)
    assert np.concatenate([part for part in found if part is not None]) == pytest.approx(expected)


def test_sequences_have_features_too(
    features: dict[str, Any], write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path))
    sequences = np.random.default_rng(0).normal(size=(300, 2, 5)).astype(np.float32)
    files = prepare(storage, write_data_set, sequences)
    make_features(storage.uri, features, files[:1], CACHE_BYTES)
    found = FeatureCache(storage, features).read(files[0])
    assert found is not None
    flat = sequences[: len(found)].reshape(len(found), -1)
    assert found == pytest.approx(np.stack([flat.mean(1), flat.max(1)], 1), abs=1e-6)


def test_only_a_changed_shard_is_forwarded(
    features: dict[str, Any], write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path))
    before = prepare(storage, write_data_set)
    make_features(storage.uri, features, before, CACHE_BYTES)
    Mean.seen.clear()
    images = IMAGES.copy()
    images[250, 0, 0, 0] ^= 1  # of the second shard
    storage.delete("steps/preprocess")
    storage.delete("d")
    after = prepare(storage, write_data_set, images)
    assert [a.sha256 == b.sha256 for a, b in zip(before, after, strict=True)] == [
        True, False, True, True
    ]  # fmt: skip
    make_features(storage.uri, features, after, CACHE_BYTES)
    assert sum(Mean.seen) == 200


def test_another_extractor_has_features_of_its_own(
    features: dict[str, Any], write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path))
    files = prepare(storage, write_data_set)
    make_features(storage.uri, features, files, CACHE_BYTES)
    other = features | {"metrics": features["metrics"] | {"num_features": 3}}
    assert FeatureCache(storage, other).names() == set()
    assert FeatureCache(storage, other).read(files[0]) is None


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _with(**arrays: np.ndarray) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        return safetensors.numpy.save(safetensors.numpy.load(content) | arrays)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: b"",
        lambda content: b"no safetensors at all, but of some length",
        _flip,
        _with(sha256=np.zeros(32, np.uint8)),
        _with(features=np.zeros((200, 2), np.float32)),
        _with(features=np.zeros((199, 2), np.float32)),
        lambda content: safetensors.numpy.save({"other": np.zeros(3)}),
    ],
)
def test_damaged_features_are_made_again(
    features: dict[str, Any],
    write_data_set: Callable[..., Any],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    storage = LocalStorage(str(tmp_path))
    (file, *_) = prepare(storage, write_data_set)
    make_features(storage.uri, features, [file], CACHE_BYTES)
    cache = FeatureCache(storage, features)
    path = cache.path_of(file)
    content = storage.read(path)
    storage.replace(path, damage(content))
    make_features(storage.uri, features, [file], CACHE_BYTES)
    assert storage.read(path) == content
    assert sum(Mean.seen) == 400


def test_features_of_a_damaged_shard_are_not_kept(
    features: dict[str, Any], write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path))
    (file, *_) = prepare(storage, write_data_set)
    storage.replace(file.path, _flip(storage.read(file.path)))
    with pytest.raises(StorageError, match="is missing or not what its manifest says"):
        make_features(storage.uri, features, [file], CACHE_BYTES)
    assert FeatureCache(storage, features).names() == set()


def test_features_that_are_not_finite_are_not_kept(
    features: dict[str, Any], write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path))
    (file, *_) = prepare(storage, write_data_set)
    Mean.offset = float("inf")
    with pytest.raises(EvaluationError, match="counting_of_a_test:make returns features that are"):
        make_features(storage.uri, features, [file], CACHE_BYTES)
    assert FeatureCache(storage, features).names() == set()


def test_what_is_excluded_is_listed_and_forwarded_all_the_same() -> None:
    file = {"split": "train", "file": "f", "sha256": "s", "bytes": 9, "count": 5}
    shards = [{"directory": "d", "files": [file | {"excluded": [1, 3]}]}]
    (found,) = list_files({"shards": shards})
    assert found == FeatureFile("train", "d/f", "s", 9, 5, (1, 3))
