"""The steps `features` and `reference`: the feature space of the score, and real images in it.

Where no Inception weights can be had, a small classifier trained on the data set's labels is
the extractor: its penultimate layer is the feature vector, and the score says so in its name.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.checkpoints import to_safetensors
from pipeline.cluster import send_task
from pipeline.dataset import open_shards, open_split, read_dataset
from pipeline.errors import DataError
from pipeline.host import torch_threads
from pipeline.loader import keyed_seed
from pipeline.order import make_order, sample_ids
from pipeline.settings import NOISE_GROUP, Config, DataConfig, FeaturesConfig
from pipeline.shards import Items, front_to_back
from pipeline.storage import open_storage
from pipeline.workflow import StepContext, read_artifact

BATCH = 256


class Classifier(nn.Module):
    """A small convolutional classifier; `forward` gives the features, `head` the logits.

    Called with uint8 images [N, C, H, W], as torchmetrics hands them on.
    """

    def __init__(self, channels: int, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, num_features),
        )  # fmt: skip
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images.float() / 127.5 - 1)


def train_extractor(context: StepContext) -> dict[str, Any]:
    """Trains the classifier on the training split; its accuracy is that on validation.

    Raises:
        DataError: there are no labels to train on.
    """
    data = context.inputs["preprocess"]
    labels, unlabelled = data["metrics"]["labels"], data["metrics"]["unlabelled"]
    if unlabelled or len(labels) < 2:
        raise DataError(
            "The classifier that scores samples needs a label for every image and two classes "
            f"or more, got {len(labels)} kinds of label with {unlabelled} images "
            "unlabelled. Put a .cls file beside each image in the shards."
        )
    result = send_task(
        _train_classifier,
        context.planned.step.resources,
        context.storage.uri,
        dict(data),
        context.config.features.model_dump_json(),
        context.config.data.model_dump_json(),
    )
    context.write_artifact("classifier.safetensors", result.pop("weights"))
    context.note(f"held-out accuracy {result['validation_accuracy']:.1%}")
    return result


def measure_reference(context: StepContext) -> dict[str, Any]:
    """Features of the real images, one array a shard and split, unaugmented.

    Raises:
        DataError: too few images for the score that is asked for, said before training.
    """
    check_counts(context.config, context.inputs["preprocess"]["metrics"]["counts"])
    content, counts = send_task(
        _extract_splits,
        context.planned.step.resources,
        context.storage.uri,
        dict(context.inputs["preprocess"]),
        dict(context.inputs["features"]),
        context.config.data.cache_bytes,
    )
    context.write_artifact("features.safetensors", content)
    return {"counts": counts}


def check_counts(config: Config, counts: Mapping[str, int]) -> None:
    """Refuses a score whose floor would have fewer images, or whose reference would be thin.

    Raises:
        DataError: too few training or test images.
    """
    num_samples, needed = config.evaluate.num_samples, 10 * config.features.width
    if counts["train"] < num_samples:
        raise DataError(
            f"The floor of the score needs evaluate.num_samples = {num_samples} training images, "
            f"and there are {counts['train']}. Lower evaluate.num_samples to at most that."
        )
    if counts["test"] < needed:
        raise DataError(
            f"The reference of the score needs 10 x features.width = {needed} test images, and "
            f"there are {counts['test']}. Raise data.test_fraction or lower features.width."
        )


def load_extractor(weights: bytes, facts: dict[str, Any]) -> Classifier:
    """The trained classifier in eval mode.

    Args:
        weights: the artifact `classifier.safetensors`.
        facts: the metrics of the step `features`.
    """
    model = Classifier(facts["channels"], facts["num_features"], facts["num_classes"])
    model.load_state_dict(safetensors.torch.load(weights))
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def extract(extractor: nn.Module, images: np.ndarray) -> np.ndarray:
    """Features float32 [N, d] of uint8 images, in batches."""
    parts = [
        extractor(torch.from_numpy(images[i : i + BATCH])).float().numpy()
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def _train_classifier(
    storage_uri: str, data: dict[str, Any], settings: str, data_settings: str
) -> dict[str, Any]:
    config = FeaturesConfig.model_validate_json(settings)
    reading = DataConfig.model_validate_json(data_settings)
    storage = open_storage(storage_uri)
    num_classes = _count_classes(read_dataset(storage, data))
    cache_bytes, window = reading.cache_bytes, reading.shuffle_window
    with (
        contextlib.closing(
            open_split(storage, data, "train", whole=window is None, cache_bytes=cache_bytes)
        ) as images,
        contextlib.closing(
            open_split(storage, data, "validation", whole=False, cache_bytes=cache_bytes)
        ) as held_out,
        torch_threads(1),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(keyed_seed("classifier", config.seed))
        model = Classifier(images.shape[0], config.width, num_classes)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=1e-2, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.num_steps
        )
        for ids in _draw_batches(config, images, window):
            logits = model.head(model(torch.from_numpy(images.gather(ids))))
            loss = F.cross_entropy(logits, torch.from_numpy(images.labels_of(ids)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        return {
            "extractor": "classifier",
            "channels": images.shape[0],
            "num_features": config.width,
            "num_classes": num_classes,
            "train_accuracy": _accuracy(model, images),
            "validation_accuracy": _accuracy(model, held_out),
            "weights": to_safetensors(model.state_dict()),
        }


def _count_classes(document: Mapping[str, Any]) -> int:
    """One more than the largest label of an image for training or choosing."""
    names = {*document["labels"]["train"], *document["labels"]["validation"]}
    classes = document["classes"]
    return 1 + max(int(name) if classes is None else classes.index(name) for name in names)


def _draw_batches(
    config: FeaturesConfig, images: Items, shuffle_window: int | None
) -> Iterator[np.ndarray]:
    """The ids of each step's batch: over all images, or in order within the window."""
    if shuffle_window is None:
        for step in range(config.num_steps):
            positions = np.arange(config.batch_size) + step * config.batch_size
            yield sample_ids(config.seed, positions, len(images))
        return
    groups = range(-(-config.batch_size // NOISE_GROUP))
    order = make_order(
        seed=config.seed,
        counts=images.counts,
        global_batch_size=len(groups) * NOISE_GROUP,
        shuffle_window=shuffle_window,
    )
    images.prefetch(order.upcoming_shards(0, groups, config.num_steps))
    for step in range(config.num_steps):
        yield order.ids(step, groups)[: config.batch_size]


@torch.inference_mode()
def _accuracy(model: Classifier, images: Items) -> float:
    images.prefetch(front_to_back(images.counts))
    right = 0
    for start in range(0, len(images), BATCH):
        ids = np.arange(start, min(start + BATCH, len(images)))
        predicted = model.head(model(torch.from_numpy(images.gather(ids)))).argmax(1).numpy()
        right += int((predicted == images.labels_of(ids)).sum())
    return right / len(images)


def _extract_splits(
    storage_uri: str, data: dict[str, Any], features: dict[str, Any], cache_bytes: int
) -> tuple[bytes, dict[str, int]]:
    storage = open_storage(storage_uri)
    weights = read_artifact(storage, features, "classifier.safetensors")
    extractor = load_extractor(weights, features["metrics"])
    arrays: dict[str, Tensor] = {}
    counts = {}
    document = read_dataset(storage, data)
    with torch_threads(1):
        for split in ("train", "validation", "test"):
            counts[split] = 0
            for shard in document["shards"]:
                images = open_shards(
                    storage, document, [shard], split, whole=False, cache_bytes=cache_bytes
                )
                if not len(images):
                    continue
                with contextlib.closing(images):
                    found = extract(extractor, images.gather(np.arange(len(images))))
                arrays[f"{split}/{shard['input']}"] = torch.from_numpy(found)
                counts[split] += len(found)
    return safetensors.torch.save(arrays), counts


def read_features(content: bytes, split: str) -> list[np.ndarray]:
    """The features of a split, one float32 [N, d] array a shard, by shard name.

    Args:
        content: the artifact `features.safetensors` of the step `reference`.
        split: `train`, `validation` or `test`.
    """
    arrays = safetensors.torch.load(content)
    return [arrays[name].numpy() for name in sorted(arrays) if name.startswith(f"{split}/")]
