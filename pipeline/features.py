"""The steps `features` and `reference`: the extractor of the score, and real images in its space.

What extractors there are is in `extractors/`; the features of each Arrow file are kept by
`feature_cache.py`, so that a reference forwards only what no one has forwarded before.
"""

import heapq
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline.cluster import lost_task, send_task
from pipeline.dataset import read_dataset
from pipeline.errors import DataError
from pipeline.extractor_identity import WEIGHTS, read_weights
from pipeline.extractors import ARTIFACT, classifier, inception, own, self_supervised
from pipeline.extractors.training import check_accuracy
from pipeline.feature_cache import FeatureCache, FeatureFile, list_files, make_features
from pipeline.scores.frechet import FeatureSums, sum_features
from pipeline.settings import Config
from pipeline.storage import damaged
from pipeline.units import SPLITS, STORAGE_THREADS
from pipeline.workflow import StepContext

LOOK_EVERY_S = 1.0
SAMPLES_PER_FEATURE = 10  # with fewer a covariance is mostly noise
TASKS_PER_CPU = 2  # at least, where there are files enough: each loads the extractor
BYTES_PER_TASK = 1 << 26  # of Arrow files, at most


def make_extractor(context: StepContext) -> dict[str, Any]:
    """Trains, loads or calls the extractor, and keeps its weights; what is told of it.

    Raises:
        DataError: there are too few images, no labels, or the weights cannot be read.
        EvaluationError: the extractor cannot be made, or has learned too little.
    """
    config, data = context.config, context.inputs["preprocess"]
    features = config.features
    check_counts(config, data["metrics"]["counts"])
    if features.is_trained and not data["metrics"]["counts"]["validation"]:
        raise DataError(
            f"The extractor {features.extractor} is judged on the validation split, which has no "
            "images. Raise data.validation_fraction."
        )
    weights = None
    if features.weights is not None:
        weights = read_weights(features, context.planned.step.settings[WEIGHTS])
    sections = (features.model_dump_json(), config.data.model_dump_json())
    send = (context.planned.step.resources, context.storage.uri, dict(data), *sections)
    match features.extractor:
        case "classifier":
            classifier.check_labels(data)
            facts = send_task(classifier.train_classifier, *send)
            check_accuracy(facts, classifier.REMEDY)
        case "self_supervised":
            facts = send_task(self_supervised.train_self_supervised, *send)
            check_accuracy(facts, self_supervised.REMEDY)
        case "inception":
            facts = send_task(
                inception.make_inception,
                context.planned.step.resources,
                features.num_features,
                config.data.channels,
                weights,
                features.weights_sha256,
            )
        case name:
            facts = send_task(
                own.make_own,
                context.planned.step.resources,
                name,
                config.data.shape,
                features.width,
                weights,
                features.seed,
            )
    context.write_artifact(ARTIFACT, facts.pop("weights"))
    told = f"{features.extractor}, {facts['num_features']:,} features"
    if facts["validation_accuracy"] is not None:
        told += f", held-out accuracy {facts['validation_accuracy']:.1%}"
    context.note(told)
    return facts


def measure_reference(context: StepContext) -> dict[str, Any]:
    """Features of the real images by split, unaugmented, and their sums.

    Raises:
        DataError: too few images for the score that is asked for.
        EvaluationError: the extractor fails on the images.
        StorageError: an Arrow file is missing or damaged.
        ClusterError: Ray lost the work.
    """
    data, features = context.inputs["preprocess"], context.inputs["features"]
    num_features = features["metrics"]["num_features"]
    check_counts(context.config, data["metrics"]["counts"], num_features)
    cache = FeatureCache(context.storage, features)
    files = list_files(read_dataset(context.storage, data))
    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        found = dict(zip(files, pool.map(cache.read, files), strict=True))
    missing = _once([file for file in files if found[file] is None])
    if missing:
        _run_tasks(context, cache, missing)
    for file in files:
        if found[file] is None:
            found[file] = cache.read(file)
    arrays: dict[str, np.ndarray] = {}
    sums = {split: sum_features(np.zeros((0, num_features), np.float32)) for split in SPLITS}
    for number, file in enumerate(files):
        of_file = found.pop(file)
        if of_file is None:
            raise damaged(context.storage, cache.path_of(file))
        if file.excluded:
            of_file = np.delete(of_file, file.excluded, axis=0)
        arrays[f"{file.split}/{number:08d}"] = of_file
        sums[file.split] += sum_features(of_file)
    context.write_artifact("features.safetensors", safetensors.numpy.save(arrays))
    context.write_artifact("sums.safetensors", _save_sums(sums))
    forwarded = sum(file.count for file in missing)
    context.note(
        f"{forwarded:,} {_noun(context)} forwarded; {len(files) - len(missing):,} of "
        f"{len(files):,} Arrow files had their features"
    )
    return {"counts": {split: s.count for split, s in sums.items()}, "forwarded": forwarded}


def check_counts(
    config: Config,
    counts: Mapping[str, int],
    num_features: int | None = None,
    num_samples: int | None = None,
) -> None:
    """Refuses a score whose floor would have fewer images, or of few samples or test images.

    Args:
        config: the whole config.
        counts: of the images by split.
        num_features: of the extractor; what the config says of it where not given.
        num_samples: that are scored; what the config says where not given.

    Raises:
        DataError: too few training images, test images or samples.
    """
    num_features = num_features or config.features.num_features or 0
    num_samples = config.evaluate.num_samples if num_samples is None else num_samples
    if counts["train"] < num_samples:
        raise DataError(
            f"The floor of the score needs as many training images as there are samples, "
            f"{num_samples:,}, and there are {counts['train']:,}. Lower evaluate.num_samples, or "
            "give fewer images."
        )
    if min(counts["test"], num_samples) < 2:
        raise DataError(
            f"A score needs two samples and two test images at least, and there are {num_samples} "
            f"and {counts['test']}. Give more."
        )
    if config.evaluate.allow_few_samples:
        return
    needed = SAMPLES_PER_FEATURE * num_features
    if counts["test"] < needed:
        raise DataError(
            f"The reference of the score needs 10 x features.width = {needed} test images, and "
            f"there are {counts['test']}. Raise data.test_fraction, lower features.width, or set "
            "evaluate.allow_few_samples."
        )
    if num_samples < needed:
        raise DataError(
            f"A score in {num_features:,} features needs {needed:,} samples, and there are "
            f"{num_samples:,}. Make more, take fewer features, or set evaluate.allow_few_samples, "
            "and the score's name will say so."
        )


def read_features(content: bytes, split: str) -> list[np.ndarray]:
    """The features of a split, float32 [N, d] for each Arrow file, in the order of its items.

    Args:
        content: the artifact `features.safetensors` of the step `reference`.
        split: `train`, `validation` or `test`.
    """
    arrays = safetensors.numpy.load(content)
    return [arrays[name] for name in sorted(arrays) if name.startswith(f"{split}/")]


def read_sums(content: bytes, split: str) -> FeatureSums:
    """The sums of the features of a split.

    Args:
        content: the artifact `sums.safetensors` of the step `reference`.
        split: `train`, `validation` or `test`.
    """
    arrays = safetensors.numpy.load(content)
    count, total, outer = (arrays[f"{split}/{part}"] for part in ("count", "total", "outer"))
    return FeatureSums(int(count), total, outer)


def _save_sums(sums: Mapping[str, FeatureSums]) -> bytes:
    arrays = {}
    for split, s in sums.items():
        arrays |= {f"{split}/total": s.total, f"{split}/outer": s.outer}
        arrays[f"{split}/count"] = np.array(s.count)
    return safetensors.numpy.save(arrays)


def _noun(context: StepContext) -> str:
    return "sequences" if context.config.data.is_sequence else "images"


def _once(files: Sequence[FeatureFile]) -> list[FeatureFile]:
    """One of those with the same content."""
    return list({file.sha256: file for file in files}.values())


def _run_tasks(context: StepContext, cache: FeatureCache, missing: Sequence[FeatureFile]) -> None:
    """One Ray task for a few files, on all CPUs; progress is by the files that are there."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    cpus = int(ray.cluster_resources().get("CPU", 1))
    task = ray.remote(num_cpus=1)(make_features)
    uri, features = context.storage.uri, dict(context.inputs["features"])
    cache_bytes = context.config.data.cache_bytes
    groups = group_files(missing, cpus)
    pending = [task.remote(uri, features, group, cache_bytes) for group in groups]
    progress = _Progress(context, missing)
    try:
        while pending:
            ready, pending = ray.wait(pending, timeout=LOOK_EVERY_S)
            for done in ready:
                ray.get(done)
            progress.tell(cache.names())
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise lost_task(error) from error
    finally:
        for left in pending:  # where one failed, the others need not go on
            ray.cancel(left)


def group_files(files: Sequence[FeatureFile], num_cpus: int) -> list[list[FeatureFile]]:
    """The files of each task: as equal in bytes as can be, and enough tasks to be even at the end.

    Args:
        files: whose features are wanted.
        num_cpus: of the cluster.
    """
    num_bytes = sum(file.num_bytes for file in files)
    count = min(len(files), max(TASKS_PER_CPU * num_cpus, num_bytes // BYTES_PER_TASK))
    groups: list[list[FeatureFile]] = [[] for _ in range(count)]
    smallest = [(0, number) for number in range(count)]
    for file in sorted(files, key=lambda file: (-file.num_bytes, file.sha256)):
        size, number = heapq.heappop(smallest)
        groups[number].append(file)
        heapq.heappush(smallest, (size + file.num_bytes, number))
    return groups


class _Progress:
    """How many images have their features, how fast that went, and the time left."""

    def __init__(self, context: StepContext, missing: Sequence[FeatureFile]) -> None:
        self._context, self._missing = context, missing
        self._total, self._before = sum(file.count for file in missing), 0
        self._started = time.monotonic()
        self._unit = _noun(context)
        context.progress(0, self._total, self._unit)

    def tell(self, names: set[str]) -> None:
        """Says how far it is, where that has changed."""
        done = sum(file.count for file in self._missing if file.sha256 in names)
        if done == self._before:
            return
        self._before = done
        rate = done / (time.monotonic() - self._started)
        left_s = (self._total - done) / rate
        self._context.progress(
            done, self._total, self._unit, rate=rate, rate_unit=f"{self._unit}/s", left_s=left_s
        )
