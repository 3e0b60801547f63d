"""The step `reference`: real images in the space of the extractor.

The features of each Arrow file are kept by `feature_cache.py`, so that a reference forwards only
what no one has forwarded before. It holds them by split, in the order of the items, as artifacts
`train-00000.safetensors`, ... of a bounded size: nothing here holds the features of all images.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline.cluster import place_tasks
from pipeline.dataset import read_dataset
from pipeline.errors import StorageError
from pipeline.feature_cache import FeatureCache, FeatureFile, list_files, make_features
from pipeline.features import check_counts
from pipeline.scores.frechet import FeatureSums, sum_features
from pipeline.storage import STORAGE_THREADS, Storage
from pipeline.tasks import own_errors, share_out
from pipeline.units import SPLITS
from pipeline.workflow import StepContext, read_artifact

LOOK_EVERY_S = 1.0
TASKS_PER_CPU = 2  # at least, where there are files enough: each loads the extractor
BYTES_PER_TASK = 1 << 26  # of Arrow files, at most
PART_BYTES = 1 << 28  # of features in an artifact, about


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
        is_there = pool.map(lambda file: cache.read(file) is not None, files)
        left = [file for file, found in zip(files, is_there, strict=True) if not found]
    missing = _once(left)
    if missing:
        _run_tasks(context, cache, missing)
    sums = {split: sum_features(np.zeros((0, num_features), np.float32)) for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(_PartWriter(context, s)) for s in SPLITS}
        for file in files:
            of_file = cache.read(file)
            if of_file is None:
                raise StorageError(
                    f"The features in {context.storage.uri}/{cache.path_of(file)} are gone or "
                    "damaged. Run the same command again: they are made anew."
                )
            if file.excluded:
                of_file = np.delete(of_file, file.excluded, axis=0)
            writers[file.split].add(of_file)
            sums[file.split] += sum_features(of_file)
    context.write_artifact("sums.safetensors", _save_sums(sums))
    forwarded = sum(file.count for file in missing)
    context.note(
        f"{forwarded:,} {_noun(context)} forwarded; {len(files) - len(left):,} of "
        f"{len(files):,} Arrow files had their features"
    )
    return {"counts": {split: s.count for split, s in sums.items()}, "forwarded": forwarded}


def iter_features(
    storage: Storage, reference: Mapping[str, Any], split: str
) -> Iterator[np.ndarray]:
    """The features of a split, float32 [n, d] for some items at a time, in their order.

    Args:
        storage: the root.
        reference: the manifest of the step `reference`.
        split: `train`, `validation` or `test`.

    Raises:
        StorageError: an artifact is missing or damaged.
    """
    for name in sorted(name for name in reference["artifacts"] if name.startswith(f"{split}-")):
        yield safetensors.numpy.load(read_artifact(storage, reference, name))["features"]


def read_features(storage: Storage, reference: Mapping[str, Any], split: str) -> np.ndarray:
    """The features of a whole split, float32 [N, d]. See `iter_features`."""
    return np.concatenate(list(iter_features(storage, reference, split)))


def pick_features(
    storage: Storage, reference: Mapping[str, Any], split: str, numbers: np.ndarray
) -> np.ndarray:
    """The features of some items of a split, float32 [len(numbers), d]. See `iter_features`.

    Args:
        storage: the root.
        reference: the manifest of the step `reference`.
        split: `train`, `validation` or `test`.
        numbers: of the items, in the order wanted.
    """
    picked, first = None, 0
    for part in iter_features(storage, reference, split):
        if picked is None:
            picked = np.empty((len(numbers), part.shape[1]), part.dtype)
        here = (numbers >= first) & (numbers < first + len(part))
        picked[here] = part[numbers[here] - first]
        first += len(part)
    assert picked is not None  # the step refuses a split without items
    return picked


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
    """Forwards files; progress is by those that are there."""
    progress = _Progress(context, missing)
    forward(
        context.storage,
        context.inputs["features"],
        missing,
        context.config.data.cache_bytes,
        on_look=lambda: progress.tell(cache.names()),
    )


def forward(
    storage: Storage,
    features: Mapping[str, Any],
    files: Sequence[FeatureFile],
    cache_bytes: int,
    on_look: Callable[[], None] = lambda: None,
) -> None:
    """Makes the features of files: one Ray task for a few of them, on all CPUs.

    Args:
        storage: the root.
        features: the manifest of the step `features`.
        files: whose features are wanted.
        cache_bytes: `data.cache_bytes`.
        on_look: called now and then, and once more when all are done.

    Raises:
        EvaluationError: the extractor fails on the images.
        StorageError: an Arrow file is missing or damaged.
        ClusterError: Ray lost the work.
    """
    import ray

    place, cpus = place_tasks()
    task: Any = ray.remote(num_cpus=1, **place)(make_features)
    groups = group_files(files, sum(cpus))
    pending = [task.remote(storage.uri, dict(features), group, cache_bytes) for group in groups]
    with own_errors(pending):
        while pending:
            ready, _ = ray.wait(pending, timeout=LOOK_EVERY_S)
            for done in ready:
                pending.remove(done)
                ray.get(done)
            on_look()


def group_files(files: Sequence[FeatureFile], num_cpus: int) -> list[list[FeatureFile]]:
    """The files of each task: as equal in bytes as can be, and enough tasks to be even at the end.

    Args:
        files: whose features are wanted.
        num_cpus: of the cluster.
    """
    num_bytes = sum(file.num_bytes for file in files)
    count = max(TASKS_PER_CPU * num_cpus, num_bytes // BYTES_PER_TASK)
    return share_out(
        files, count, size_of=lambda file: file.num_bytes, name_of=lambda file: file.sha256
    )


class _PartWriter:
    """Writes the features of a split as artifacts of a bounded size."""

    def __init__(self, context: StepContext, split: str) -> None:
        self._context, self._split = context, split
        self._parts: list[np.ndarray] = []
        self._number = 0

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()

    def add(self, features: np.ndarray) -> None:
        """Takes those of the next items."""
        self._parts.append(features)
        if sum(part.nbytes for part in self._parts) >= PART_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._parts:
            content = safetensors.numpy.save({"features": np.concatenate(self._parts)})
            name = f"{self._split}-{self._number:05d}.safetensors"
            self._context.write_artifact(name, content)
            self._parts, self._number = [], self._number + 1


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
