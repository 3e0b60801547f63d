"""Samples and their features, drawn by tasks on the cluster, a chunk of 64 seeds at a time.

A chunk's file is written when it is drawn, so that a killed evaluation repeats at most the chunks
in flight. On CPUs of one kind a sample is the same to the bit however the chunks are spread.
"""

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusion_core import CHUNK
from pipeline.cluster import alive_nodes, gpu_places, place_tasks
from pipeline.dataset import open_split
from pipeline.errors import ClusterError, EvaluationError, StorageError
from pipeline.extractors import extract, load_extractor
from pipeline.host import full_precision, gpu_memory_told, keep_freed_memory, torch_threads
from pipeline.sampling import draw_labels, quantise, sample_items
from pipeline.settings import Config, EvaluateConfig
from pipeline.storage import Storage, open_storage
from pipeline.subjects import Network, Source, load_network
from pipeline.tasks import own_errors
from pipeline.workflow import StepContext

TASKS_PER_CPU = 4  # so that the last ones end at about the same time
TASKS_PER_GPU = 1  # Ray gives each a new process, which takes seconds to be ready
TASK_RETRIES = 3  # of a task whose worker died
FOR_MEMORY = (
    f"{CHUNK} samples are drawn at a time: see that nothing else uses the GPU, or set "
    "evaluate.use_gpu = false."
)


@dataclass(frozen=True)
class Series:
    """The samples 0..num_samples - 1 of one network with the same settings.

    Args:
        name: of its files.
        source: of the network.
        settings: of the sampler.
        num_samples: that are drawn.
    """

    name: str
    source: Source
    settings: EvaluateConfig
    num_samples: int

    @property
    def starts(self) -> range:
        """The first number of each chunk."""
        return range(0, self.num_samples, CHUNK)


def draw(context: StepContext, all_series: Sequence[Series]) -> None:
    """Draws what is not drawn yet, on all CPUs or GPUs of the cluster.

    Raises:
        EvaluationError: samples that are not finite.
        ClusterError: Ray lost a task more often than it is tried again.
    """
    import ray

    config, storage = context.config, context.storage
    total = sum(series.num_samples for series in all_series)
    left = [
        (series, first)
        for series in all_series
        for first in series.starts
        if not storage.exists(_path(context.directory, series.name, first))
    ]
    before = done = total - sum(_count(series, first) for series, first in left)
    if config.evaluate.use_gpu:
        kind, place, num_tasks = "GPU", {}, TASKS_PER_GPU * gpu_places(alive_nodes())
    else:
        place, cpus = place_tasks()
        kind, num_tasks = "CPU", TASKS_PER_CPU * sum(cpus)
    if not num_tasks:  # those that there were before are gone
        raise ClusterError(
            f"Samples are drawn on {kind}s, one for each task, and the cluster has none now. Run "
            "the same command again when nodes are back."
        )
    groups = _deal(left, num_tasks)
    num_gpus = 1 if config.evaluate.use_gpu else 0
    options = {"num_cpus": 1, "num_gpus": num_gpus, "max_retries": TASK_RETRIES, **place}
    task: Any = ray.remote(**options)(_draw_chunks)
    started = time.monotonic()
    context.progress(done, total, "samples")
    arguments = (storage.uri, config.model_dump_json(), json.dumps(context.inputs["features"]))
    running: list[Any] = [task.remote(*arguments, context.directory, group) for group in groups]
    with own_errors(running):
        while running:
            (ready, *_), _ = ray.wait(running, num_returns=1)
            running.remove(ready)
            chunks: Any = ready  # a generator of references
            try:
                done += int(ray.get(next(chunks)))  # pyright: ignore[reportArgumentType]
            except StopIteration:
                continue
            running.append(ready)
            rate = (done - before) / (time.monotonic() - started)
            rates = {"rate": rate, "rate_unit": "samples/s", "left_s": (total - done) / rate}
            context.progress(done, total, "samples", **rates)


def read_all(context: StepContext, series: Series, name: str) -> np.ndarray:
    """One of the arrays of a series, such as `features`, in the order of the numbers."""
    return np.concatenate([chunk[name] for chunk in iter_chunks(context, series)])


def iter_chunks(context: StepContext, series: Series) -> Iterator[dict[str, np.ndarray]]:
    """The chunks of a series, in order.

    Each has `items` (uint8 [N, C, H, W] or float32 [N, C, L]) and `features` (float32 [N, d]),
    `logits` [N, classes] where the extractor classifies, and `labels` (int64 [N]) where the network
    is told the class.
    """
    for first in series.starts:
        path = _path(context.directory, series.name, first)
        try:
            chunk = safetensors.numpy.load(context.storage.read(path))
        except (FileNotFoundError, SafetensorError) as error:
            context.storage.delete(path)
            raise StorageError(
                f"{context.storage.uri}/{path} is missing or damaged. Run the same command again: "
                "it is drawn anew."
            ) from error
        yield chunk


def chunk_directory(directory: str) -> str:
    """Where the chunks of a step lie until it is done."""
    return f"{directory}/chunks"


@torch.inference_mode()
def draw_items(
    config: Config, network: Network, numbers: range, labels: Tensor | None
) -> np.ndarray:
    """Samples as they are stored and scored: uint8 [N, C, H, W] or float32 [N, C, L].

    Args:
        config: the shape of the items, and the settings of `evaluate`.
        network: that makes them.
        numbers: of the samples; a number's noise is always the same.
        labels: int64 [N], for a network that is told the class.

    Raises:
        EvaluationError: the samples are not finite.
    """
    x = sample_items(
        config, network.model, numbers, diffusion=network.diffusion, class_labels=labels
    )
    if num_bad := int((~torch.isfinite(x).flatten(1).all(1)).sum()):
        raise EvaluationError(
            f"{num_bad} of the samples {numbers[0]} to {numbers[-1]} hold values that are not "
            "finite. Train again with a lower train.learning_rate, or evaluate another checkpoint."
        )
    return x.cpu().numpy() if config.data.is_sequence else quantise(x)


def draw_chunk(
    config: Config,
    network: Network,
    extractor: nn.Module,
    numbers: range,
    labels: Tensor | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples, see `draw_items`, and their features float32 [N, d].

    Raises:
        EvaluationError: the samples are not finite.
    """
    items = draw_items(config, network, numbers, labels)
    return items, extract(extractor, items)


def iter_drawn(
    config: Config, network: Network, extractor: nn.Module, num_samples: int, first: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """So many samples and their features, a chunk at a time, here.

    Args:
        config: the shape of the items, and the settings of `evaluate`.
        network: that makes them.
        extractor: of the features.
        num_samples: in all.
        first: number of the first one.

    Raises:
        EvaluationError: the samples are not finite.
    """
    for start in range(0, num_samples, CHUNK):
        numbers, labels = range(first + start, first + min(start + CHUNK, num_samples)), None
        if network.counts is not None:
            labels = draw_labels(network.counts, config.evaluate.seed, numbers)
        yield draw_chunk(config, network, extractor, numbers, labels)


def _draw_chunks(
    storage_uri: str,
    config_json: str,
    features_json: str,
    directory: str,
    jobs: Sequence[tuple[Series, int]],
) -> Iterator[int]:
    """One task: draws chunks and writes each; yields how many samples each has."""
    storage, config = open_storage(storage_uri), Config.model_validate_json(config_json)
    keep_freed_memory()
    # Threads and precision as for the reference.
    with torch_threads(1), full_precision(), gpu_memory_told(FOR_MEMORY):
        extractor = _load_extractor(storage_uri, features_json, device_of(config))
        for series, first in jobs:
            path, count = _path(directory, series.name, first), _count(series, first)
            if not storage.exists(path):  # else an earlier attempt of this task drew it
                if series.source.kind == "images":
                    arrays = _read_one(storage, config, series, first, extractor)
                else:
                    network = _load_network(storage_uri, config_json, series.source.to_json())
                    arrays = _draw_one(config, series, first, network, extractor)
                storage.create(path, safetensors.numpy.save(arrays))
            yield count


def _draw_one(
    config: Config, series: Series, first: int, network: Network, extractor: nn.Module
) -> dict[str, np.ndarray]:
    numbers, labels = range(first, first + _count(series, first)), None
    if network.counts is not None:
        labels = draw_labels(network.counts, series.settings.seed, numbers)
    config = config.model_copy(update={"evaluate": series.settings})
    items, features = draw_chunk(config, network, extractor, numbers, labels)
    arrays = {"items": items, "features": features} | _logits(extractor, features)
    return arrays if labels is None else arrays | {"labels": labels.numpy()}


def _read_one(
    storage: Storage, config: Config, series: Series, first: int, extractor: nn.Module
) -> dict[str, np.ndarray]:
    """The same of images that were given."""
    assert series.source.manifest is not None
    images = open_split(
        storage,
        series.source.manifest,
        "train",
        whole=False,
        cache_bytes=config.data.cache_bytes,
    )
    with contextlib.closing(images):
        items = images.gather(np.arange(first, first + _count(series, first)))
    features = extract(extractor, items)
    return {"items": items, "features": features} | _logits(extractor, features)


@torch.inference_mode()
def _logits(extractor: nn.Module, features: np.ndarray) -> dict[str, np.ndarray]:
    """Those of an extractor that classifies."""
    if (head := getattr(extractor, "head", None)) is None:
        return {}
    device = next(extractor.parameters()).device
    return {"logits": head(torch.from_numpy(features).to(device)).float().cpu().numpy()}


@functools.lru_cache(maxsize=2)  # a worker process draws many chunks of few networks
def _load_network(storage_uri: str, config_json: str, source_json: str) -> Network:
    config = Config.model_validate_json(config_json)
    network = load_network(open_storage(storage_uri), config, Source(**json.loads(source_json)))
    return network.to(device_of(config))


@functools.lru_cache(maxsize=1)
def _load_extractor(storage_uri: str, features_json: str, device: str) -> nn.Module:
    return load_extractor(open_storage(storage_uri), json.loads(features_json)).to(device)


def device_of(config: Config) -> str:
    """Where tasks draw samples."""
    return "cuda" if config.evaluate.use_gpu else "cpu"


def _deal(jobs: Sequence[Any], count: int) -> list[list[Any]]:
    """The jobs in at most so many groups of neighbours, as equal as can be."""
    ends = np.linspace(0, len(jobs), min(count, len(jobs)) + 1).round().astype(int).tolist()
    return [list(jobs[a:b]) for a, b in pairwise(ends)]


def _count(series: Series, first: int) -> int:
    return min(CHUNK, series.num_samples - first)


def _path(directory: str, name: str, first: int) -> str:
    return f"{chunk_directory(directory)}/{name}-{first:08d}.safetensors"
