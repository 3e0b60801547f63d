"""The extractor `self_supervised`: a small network that has learned which way up images are.

To tell by how many right angles an image was turned, a network must know the shapes in it; no
labels are needed. Images that look the same from all sides teach it nothing, which its accuracy
shows.

Reference: Gidaris et al. (1803.07728), section 2.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.extractors.small import SmallNetwork
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

TURNS = 4  # by 0, 90, 180, 270 degrees
REMEDY = (
    "or, if the images have no up and down, set features.extractor to another: 'classifier', "
    "'inception', or one of your own."
)


def train_self_supervised(
    storage_uri: str, data: dict[str, Any], settings: str, data_settings: str
) -> dict[str, Any]:
    """A task: what is told of the network, and its `weights` as a safetensors file.

    Args:
        storage_uri: of the root.
        data: the manifest of the step `preprocess`.
        settings: of `features`, as JSON.
        data_settings: of `data`, as JSON.
    """
    config = FeaturesConfig.model_validate_json(settings)
    reading = DataConfig.model_validate_json(data_settings)
    with open_items(open_storage(storage_uri), data, reading) as (images, held_out):
        channels = images.shape[0]
        count = max(1, config.batch_size // TURNS)
        batches = _turned(images, draw_ids(config, images, reading.shuffle_window, count))
        network = train_network("self_supervised", config, channels, TURNS, batches)
        accuracies = [
            measure_accuracy(network, _turned(items, iter_ids(items, BATCH // TURNS)))
            for items in (images, held_out)
        ]
    kept = SmallNetwork(channels, network.num_features, None)
    kept.load_state_dict(
        {k: v for k, v in network.state_dict().items() if not k.startswith("head.")}
    )
    return make_facts("self_supervised", kept, accuracies, channels)


def _turned(images: Items, batches: Iterator[np.ndarray]) -> Batches:
    """Each image four times, with the number of right angles by which it was turned."""
    for ids in batches:
        upright = torch.from_numpy(images.gather(ids))
        turned = torch.cat([torch.rot90(upright, k, (2, 3)) for k in range(TURNS)])
        yield turned, torch.arange(TURNS).repeat_interleave(len(ids))
