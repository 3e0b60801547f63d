"""The extractor `classifier`: a small network that has learned the data set's labels."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.dataset import read_dataset
from pipeline.errors import DataError
from pipeline.extractors.training import (
    BATCH,
    Batches,
    draw_ids,
    iter_ids,
    make_facts,
    measure_accuracy,
    open_items,
    train_network,
)
from pipeline.settings import DataConfig, FeaturesConfig
from pipeline.shards import Items
from pipeline.storage import open_storage

REMEDY = "see that the labels are right, or set features.extractor = 'self_supervised'."


def check_labels(data: Mapping[str, Any]) -> None:
    """Refuses a data set without labels enough.

    Args:
        data: the manifest of the step `preprocess`.

    Raises:
        DataError: there are images without a label, or fewer than two classes.
    """
    labels, unlabelled = data["metrics"]["labels"], data["metrics"]["unlabelled"]
    if unlabelled or len(labels) < 2:
        raise DataError(
            "The classifier that scores samples needs a label for every image and two classes "
            f"or more, got {len(labels)} kinds of label with {unlabelled} images "
            "unlabelled. Put a .cls file beside each image in the shards, or set "
            "features.extractor = 'self_supervised', which needs no labels."
        )


def train_classifier(
    storage_uri: str, data: dict[str, Any], settings: str, data_settings: str
) -> dict[str, Any]:
    """A task: what is told of the classifier, and its `weights` as a safetensors file.

    Args:
        storage_uri: of the root.
        data: the manifest of the step `preprocess`.
        settings: of `features`, as JSON.
        data_settings: of `data`, as JSON.
    """
    config = FeaturesConfig.model_validate_json(settings)
    reading = DataConfig.model_validate_json(data_settings)
    storage = open_storage(storage_uri)
    num_classes = count_classes(read_dataset(storage, data))
    with open_items(storage, data, reading) as (images, held_out):
        channels = images.shape[0]
        ids = draw_ids(config, images, reading.shuffle_window, config.batch_size)
        batches = _with_labels(images, ids)
        network = train_network("classifier", config, channels, num_classes, batches)
        accuracies = [
            measure_accuracy(network, _with_labels(items, iter_ids(items, BATCH)))
            for items in (images, held_out)
        ]
    return make_facts("classifier", network, accuracies, channels)


def count_classes(document: Mapping[str, Any]) -> int:
    """One more than the largest label of an image for training or choosing.

    Args:
        document: of the data set.
    """
    names = {*document["labels"]["train"], *document["labels"]["validation"]}
    classes = document["classes"]
    return 1 + max(int(name) if classes is None else classes.index(name) for name in names)


def _with_labels(images: Items, batches: Any) -> Batches:
    for ids in batches:
        yield torch.from_numpy(images.gather(ids)), torch.from_numpy(images.labels_of(ids))
