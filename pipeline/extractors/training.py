"""Training a small network on the data set, and judging whether it has learned enough.

Features of a network that cannot tell what it was to learn say little about images; such a network
is refused as an extractor.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.checkpoints import to_safetensors
from pipeline.dataset import open_split
from pipeline.errors import EvaluationError
from pipeline.extractors.small import SmallNetwork
from pipeline.host import torch_threads
from pipeline.loader import keyed_seed
from pipeline.order import make_order, sample_ids
from pipeline.settings import NOISE_GROUP, DataConfig, FeaturesConfig
from pipeline.shards import Items, front_to_back
from pipeline.storage import Storage, hash_content

BATCH = 256  # images at once where accuracy is counted
LARGEST_ERROR = 0.5  # of that of always guessing the most frequent class

Batches = Iterator[tuple[Tensor, Tensor]]  # uint8 images [N, C, H, W], classes int64 [N]


@contextlib.contextmanager
def open_items(
    storage: Storage, data: Mapping[str, Any], reading: DataConfig
) -> Iterator[tuple[Items, Items]]:
    """The items to learn from and those held out, on one CPU thread.

    Args:
        storage: the root.
        data: the manifest of the step `preprocess`.
        reading: how the data set is read.
    """
    is_whole, cache_bytes = reading.shuffle_window is None, reading.cache_bytes
    with (
        contextlib.closing(
            open_split(storage, data, "train", whole=is_whole, cache_bytes=cache_bytes)
        ) as images,
        contextlib.closing(
            open_split(storage, data, "validation", whole=False, cache_bytes=cache_bytes)
        ) as held_out,
        torch_threads(1),
    ):
        yield images, held_out


def train_network(
    name: str, config: FeaturesConfig, channels: int, num_classes: int, batches: Batches
) -> SmallNetwork:
    """A network that tells classes apart, trained with AdamW on the cross-entropy; in eval mode.

    Args:
        name: of the extractor.
        config: its settings.
        channels: of the images.
        num_classes: of the batches.
        batches: `config.num_steps` of them.
    """
    assert config.num_features is not None  # of what is trained it is known
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(name, config.seed))
        network = SmallNetwork(channels, config.num_features, num_classes)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=1e-2, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps
    )
    for images, classes in batches:
        loss = F.cross_entropy(network.head(network(images)), classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def draw_ids(
    config: FeaturesConfig, images: Items, shuffle_window: int | None, count: int
) -> Iterator[np.ndarray]:
    """The ids of each step's images: over all, or in order within the window.

    Args:
        config: of the extractor.
        images: to learn from.
        shuffle_window: `data.shuffle_window`.
        count: of images in a step.
    """
    if shuffle_window is None:
        for step in range(config.num_steps):
            yield sample_ids(config.seed, np.arange(count) + step * count, len(images))
        return
    groups = range(-(-count // NOISE_GROUP))
    order = make_order(
        seed=config.seed,
        counts=images.counts,
        global_batch_size=len(groups) * NOISE_GROUP,
        shuffle_window=shuffle_window,
    )
    images.prefetch(order.upcoming_shards(0, groups, config.num_steps))
    for step in range(config.num_steps):
        yield order.ids(step, groups)[:count]


def iter_ids(images: Items, count: int) -> Iterator[np.ndarray]:
    """The ids of all images from front to back, so many at once."""
    images.prefetch(front_to_back(images.counts))
    for start in range(0, len(images), count):
        yield np.arange(start, min(start + count, len(images)))


@torch.inference_mode()
def measure_accuracy(network: SmallNetwork, batches: Batches) -> tuple[float, float]:
    """The share that is told right, and that of always guessing the most frequent class."""
    right, frequencies = 0, torch.zeros(0, dtype=torch.int64)
    for images, classes in batches:
        logits = network.head(network(images))
        right += int((logits.argmax(1) == classes).sum())
        length = max(logits.shape[1], len(frequencies))
        frequencies = F.pad(frequencies, (0, length - len(frequencies)))
        frequencies += torch.bincount(classes[classes >= 0], minlength=length)
    total = int(frequencies.sum())
    return right / max(total, 1), int(frequencies.max()) / max(total, 1)


def make_facts(
    name: str, network: SmallNetwork, accuracies: Sequence[tuple[float, float]], channels: int
) -> dict[str, Any]:
    """What is told of a trained extractor.

    Args:
        name: of the extractor.
        network: trained, or what is kept of it.
        accuracies: what `measure_accuracy` found of the training and of the held-out images.
        channels: of the images.
    """
    weights = to_safetensors(network.state_dict())
    has_head = hasattr(network, "head")
    return {
        "extractor": name,
        "channels": channels,
        "num_features": network.num_features,
        "num_classes": network.head[-1].out_features if has_head else None,
        "classifies": has_head,
        "train_accuracy": accuracies[0][0],
        "validation_accuracy": accuracies[1][0],
        "guessing_accuracy": accuracies[1][1],
        "has_standard_weights": False,
        "weights_sha256": hash_content(weights),
        "code_sha256": None,
        "weights": weights,
    }


def check_accuracy(facts: Mapping[str, Any], remedy: str) -> None:
    """Refuses a network that errs more than half as often as guessing does.

    Args:
        facts: of a trained extractor.
        remedy: what else may be done, a sentence.

    Raises:
        EvaluationError: it is too poor to be an extractor.
    """
    accuracy, guessing = facts["validation_accuracy"], facts["guessing_accuracy"]
    needed = 1 - LARGEST_ERROR * (1 - guessing)
    if accuracy < needed:
        raise EvaluationError(
            f"The extractor {facts['extractor']} is right for {accuracy:.1%} of the validation "
            f"images, where {needed:.1%} are needed: half of the errors of always guessing the "
            f"most frequent class ({guessing:.1%} right). Raise features.num_steps or "
            f"features.width, {remedy}"
        )
