"""The step `evaluate`: DDIM samples from the EMA weights, and their score with its protocol.

Samples are drawn in fixed chunks of consecutive seeds, one Ray task each; a chunk's file is
kept until the step is done, so that a killed evaluation repeats at most the chunks in flight.
Beside the score stand a floor (real training images) and a ceiling (an untrained network),
with the same reference and the same number of images.
"""

import contextlib
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from diffusion_core import CHUNK, Diffusion, UNet, make_image_noise
from pipeline.cluster import lost_task
from pipeline.dataset import class_counts, open_split, read_dataset
from pipeline.errors import EvaluationError
from pipeline.features import check_counts, extract, load_extractor, read_features
from pipeline.host import keep_freed_memory, torch_threads
from pipeline.loader import keyed_seed
from pipeline.models import make_diffusion, make_unet
from pipeline.sampling import quantise, sample_items, spread_labels
from pipeline.settings import Config
from pipeline.shards import write_arrow
from pipeline.statistics import FeatureSums, frechet_distance, sum_features
from pipeline.storage import open_storage
from pipeline.workflow import StepContext, read_artifact

REFERENCE_SPLIT = "test"
STRIP_LENGTH = 10
NETWORKS = ("trained", "untrained")


def evaluate(context: StepContext) -> dict[str, Any]:
    """Samples, scores, and writes the samples and the pictures of the report.

    Raises:
        DataError: fewer training images than samples, so that the floor would not be comparable.
        EvaluationError: samples that are not finite.
    """
    config, settings = context.config, context.config.evaluate
    check_counts(config, context.inputs["preprocess"]["metrics"]["counts"])
    features = read_features(context.read_input("reference", "features.safetensors"), "train")
    real = np.concatenate(features)
    _sample_all_chunks(context)
    images, sums = {}, {}
    for network in NETWORKS:
        chunks = [
            safetensors.numpy.load(context.storage.read(_chunk_path(context, network, first)))
            for first in _chunk_starts(config)
        ]
        images[network] = np.concatenate([chunk["images"] for chunk in chunks])
        sums[network] = sum_features(np.concatenate([chunk["features"] for chunk in chunks]))
    order = np.random.Generator(np.random.Philox(key=keyed_seed("floor", settings.seed)))
    sums["floor"] = sum_features(real[order.permutation(len(real))[: settings.num_samples]])
    score = _score(context, sums)

    drawn = images["trained"]
    names = [f"sample {k}" for k in range(len(drawn))]
    context.write_artifact("samples.arrow", write_arrow(drawn, [None] * len(drawn), names))
    context.write_artifact("pictures.safetensors", safetensors.numpy.save(_draw_strips(context)))
    context.scratch.append(f"{context.directory}/chunks")
    context.note(
        f"{score['metric']} {score['value']:.2f} "
        f"(floor {score['floor']:.2f}, ceiling {score['ceiling']:.2f})"
    )
    return score


def _score(context: StepContext, sums: Mapping[str, FeatureSums]) -> dict[str, Any]:
    config = context.config
    features = context.inputs["features"]
    extractor = load_extractor(
        context.read_input("features", "classifier.safetensors"), features["metrics"]
    )
    content = context.read_input("reference", "features.safetensors")
    reference = sum_features(np.concatenate(read_features(content, REFERENCE_SPLIT)))
    values = {name: frechet_distance(extractor, reference, s) for name, s in sums.items()}
    if not np.isfinite(values["trained"]):
        raise EvaluationError(
            "The score is not finite: the samples or their features are not. Train again with a "
            "lower train.learning_rate."
        )
    return {
        "metric": metric_name(features),
        "value": values["trained"],
        "floor": values["floor"],
        "ceiling": values["untrained"],
        "protocol": make_protocol(
            config,
            features,
            context.inputs["reference"],
            split=REFERENCE_SPLIT,
            num_samples=sums["trained"].count,
        ),
    }


def metric_name(features: Mapping[str, Any]) -> str:
    """What a score is called, of the manifest of the step `features`."""
    return f"fid[{features['metrics']['extractor']}]"


def make_protocol(
    config: Config,
    features: Mapping[str, Any],
    reference: Mapping[str, Any],
    *,
    split: str,
    num_samples: int,
) -> dict[str, Any]:
    """All that a score depends on but the network; scores compare where these are equal.

    Args:
        config: the whole config.
        features: the manifest of that step.
        reference: the manifest of that step.
        split: whose images are the reference.
        num_samples: that are scored.
    """
    settings = config.evaluate
    return {
        "reference": reference["key"],
        "reference_split": split,
        "reference_count": reference["metrics"]["counts"][split],
        "extractor": features["metrics"]["extractor"],
        "extractor_sha256": features["artifacts"]["classifier.safetensors"]["sha256"],
        "feature_width": features["metrics"]["num_features"],
        "num_samples": num_samples,
        "seed": settings.seed,
        "chunk": CHUNK,
        "weights": "ema",
        "ema_decay": config.train.ema_decay,
        "sampler": "ddim",
        "num_steps": settings.num_steps,
        "spacing": settings.spacing,
        "eta": settings.eta,
        "clip_x_start": settings.clip_x_start,
        "guidance_scale": settings.guidance_scale if config.model.class_conditional else None,
        "resolution": config.data.resolution,
        "mode": config.data.mode,
        "resize": config.data.resample,
        "fit": config.data.fit,
        "implementation": f"torchmetrics {version('torchmetrics')}",
    }


def _sample_all_chunks(context: StepContext) -> None:
    import ray
    from ray.exceptions import RayError, RayTaskError

    config = context.config
    total = config.evaluate.num_samples * len(NETWORKS)
    pending: dict[Any, int] = {}
    done = 0
    task = ray.remote(num_cpus=1)(_sample_chunk)
    train = dict(context.inputs["train"])
    features = dict(context.inputs["features"])
    counts = _class_counts(context)
    for network in NETWORKS:
        for first in _chunk_starts(config):
            count = min(CHUNK, config.evaluate.num_samples - first)
            path = _chunk_path(context, network, first)
            if context.storage.exists(path):
                done += count
                continue
            weights = train if network == "trained" else None
            arguments = (context.storage.uri, config.model_dump_json(), weights, features, counts)
            pending[task.remote(*arguments, first, count, path)] = count
    started, before = time.monotonic(), done
    context.progress(done, total, "images")
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        try:
            ray.get(ready[0])
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise lost_task(error) from error
        done += pending.pop(ready[0])
        rate = (done - before) / (time.monotonic() - started)
        left_s = (total - done) / rate
        context.progress(done, total, "images", rate=rate, rate_unit="images/s", left_s=left_s)


def _sample_chunk(
    storage_uri: str,
    config_json: str,
    train: dict[str, Any] | None,
    features: dict[str, Any],
    counts: dict[int, int] | None,
    first: int,
    count: int,
    path: str,
) -> None:
    """Draws the images first .. first + count - 1 and their features into one file."""
    storage = open_storage(storage_uri)
    config = Config.model_validate_json(config_json)
    model = make_unet(config, config.train.seed, _num_classes(counts))
    if train is not None:
        content = read_artifact(storage, train, "ema.safetensors")
        model.load_state_dict(safetensors.torch.load(content))
    weights = read_artifact(storage, features, "classifier.safetensors")
    extractor = load_extractor(weights, features["metrics"])
    keep_freed_memory()
    with torch_threads(1):
        numbers, labels = range(first, first + count), None
        if counts is not None:
            labels = spread_labels(counts, numbers, config.evaluate.num_samples)
        images, found = draw_chunk(config, model, extractor, numbers, labels)
    storage.create(path, safetensors.numpy.save({"images": images, "features": found}))


def draw_chunk(
    config: Config, model: UNet, extractor: nn.Module, numbers: range, labels: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """Samples as uint8 images [N, C, H, W], and their features float32 [N, d].

    Args:
        config: shape, process and the settings of `evaluate`.
        model: the network.
        extractor: of the features.
        numbers: of the samples; a number's noise is always the same.
        labels: int64 [N], for a network that is told the class.

    Raises:
        EvaluationError: the samples are not finite.
    """
    x = sample_items(config, model, numbers, class_labels=labels)
    if not bool(torch.isfinite(x).all()):
        raise EvaluationError(
            f"Samples {numbers[0]} to {numbers[-1]} hold values that are not finite. Train again "
            "with a lower train.learning_rate."
        )
    images = quantise(x)
    return images, extract(extractor, images)


def _draw_strips(context: StepContext) -> dict[str, np.ndarray]:
    """One test image being noised, one sample being denoised, and real images for the grid."""
    config = context.config
    diffusion = make_diffusion(config)
    data, cache_bytes = dict(context.inputs["preprocess"]), config.data.cache_bytes
    test = open_split(context.storage, data, REFERENCE_SPLIT, whole=False, cache_bytes=cache_bytes)
    with contextlib.closing(test):
        real = test.gather(np.arange(min(len(test), CHUNK)))
    counts = _class_counts(context)
    model = make_unet(config, config.train.seed, _num_classes(counts))
    content = context.read_input("train", "ema.safetensors")
    model.load_state_dict(safetensors.torch.load(content))
    labels = None if counts is None else spread_labels(counts, range(1), 1)
    num_steps = config.evaluate.num_steps
    shown = set(np.linspace(1, num_steps, STRIP_LENGTH).round().astype(int).tolist())
    states: list[np.ndarray] = []

    def keep(k: int, x: Tensor) -> None:
        if k in shown:
            states.append(quantise(x)[0])

    sample_items(config, model, range(1), class_labels=labels, on_step=keep)
    return {
        "real": real,
        "noising": _noise_one(diffusion, real[0]),
        "denoising": np.stack(states),
    }


def _noise_one(diffusion: Diffusion, image: np.ndarray) -> np.ndarray:
    """An image at evenly spaced timesteps of the forward process, with one noise."""
    t = torch.linspace(0, diffusion.num_train_timesteps - 1, STRIP_LENGTH).round().long()
    x_start = torch.from_numpy(image).float().div(127.5).sub(1).expand(STRIP_LENGTH, *image.shape)
    noise, _ = make_image_noise(image.shape, [0])
    return quantise(diffusion.q_sample(x_start, t, noise.expand_as(x_start)))


def _class_counts(context: StepContext) -> dict[int, int] | None:
    """Training images by label, where the network is told the class; all classes are named."""
    if not context.config.model.class_conditional:
        return None
    return class_counts(read_dataset(context.storage, context.inputs["preprocess"]), "train")


def _num_classes(counts: dict[int, int] | None) -> int | None:
    return None if counts is None else max(counts) + 1


def _chunk_starts(config: Config) -> range:
    return range(0, config.evaluate.num_samples, CHUNK)


def _chunk_path(context: StepContext, network: str, first: int) -> str:
    return f"{context.directory}/chunks/{network}-{first:08d}.safetensors"
