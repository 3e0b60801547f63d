"""New input shards in the features of the pinned extractor: which of them have drifted.

What is compared with what is in `scores/drift.py`. The features are those of `feature_cache.py`,
so that a shard is forwarded once, and a reference that takes it in later finds them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import StorageError
from pipeline.feature_cache import FeatureCache, FeatureFile, list_files
from pipeline.reference import forward, read_features, read_sums
from pipeline.scores.drift import Drift, measure_drift
from pipeline.storage import Storage
from pipeline.workflow import read_artifact

REFERENCE_SPLIT = "test"  # that distances are measured to, as those of samples are


def measure_shards(
    storage: Storage,
    document: Mapping[str, Any],
    names: Sequence[str],
    pinned: Mapping[str, Mapping[str, Any]],
    *,
    factor: float,
    cache_bytes: int,
) -> dict[str, Drift | None]:
    """Measures shards against the pinned reference, by name; None where there are too few items.

    Args:
        storage: the root.
        document: of the data set that holds them.
        names: of the input shards.
        pinned: the manifests of the steps `features` and `reference`.
        factor: `retrain.drift_factor`.
        cache_bytes: `data.cache_bytes`.

    Raises:
        EvaluationError: features are not finite.
        StorageError: a file is missing or damaged.
        ClusterError: Ray lost the work.
    """
    features, reference = pinned["features"], pinned["reference"]
    files = {name: _files_of(document, name) for name in names}
    cache = FeatureCache(storage, features)
    missing = {f.sha256: f for group in files.values() for f in group if cache.read(f) is None}
    if missing:
        forward(storage, features, list(missing.values()), cache_bytes)
    sums = read_sums(read_artifact(storage, reference, "sums.safetensors"), REFERENCE_SPLIT)
    training = read_features(storage, reference, "train")
    found: dict[str, Drift | None] = {}
    for name, group in files.items():
        parts = [_read(storage, cache, file) for file in group]
        shard = np.concatenate(parts) if parts else training[:0]
        found[name] = measure_drift(shard, training, sums, factor=factor)
    return found


def _files_of(document: Mapping[str, Any], name: str) -> list[FeatureFile]:
    """The Arrow files of an input shard, all splits."""
    shards = [shard for shard in document["shards"] if shard["input"] == name]
    return list_files({"shards": shards})


def _read(storage: Storage, cache: FeatureCache, file: FeatureFile) -> np.ndarray:
    features = cache.read(file)
    if features is None:
        raise StorageError(
            f"The features in {storage.uri}/{cache.path_of(file)} are gone or damaged. Run the "
            "same command again: they are made anew."
        )
    return features
