"""The score of a trial: the same protocol for every schedule, on the validation split."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from diffusion_core import CHUNK
from diffusion_core.bound import variational_bound
from pipeline.dataset import class_counts, open_split, read_dataset
from pipeline.drawing import draw_items, iter_drawn
from pipeline.errors import EvaluationError
from pipeline.extractors import load_extractor, score_name
from pipeline.fid_validation import SPLIT
from pipeline.host import full_precision
from pipeline.loader import keyed_seed
from pipeline.models import make_diffusion
from pipeline.protocol import make_protocol
from pipeline.reference import read_sums
from pipeline.sampling import draw_labels
from pipeline.scores.frechet import frechet_distance, sum_features
from pipeline.settings import Config
from pipeline.storage import Storage
from pipeline.subjects import Network
from pipeline.validation import choose_items
from pipeline.workflow import read_artifact

NUM_SHOWN = 32  # samples that a score keeps for the eye

Inputs = Mapping[str, Mapping[str, Any]]  # manifests by step name
Score = Callable[[Any], tuple[float, bytes]]  # of a network: the value, and samples


def trial_protocol(config: Config, inputs: Inputs) -> dict[str, Any]:
    """All that the score of a trial depends on but the network.

    Args:
        config: of the trial.
        inputs: the manifests of `preprocess`, `features` and `reference`.
    """
    if config.tune.metric == "fid":
        return make_protocol(
            config,
            inputs["features"],
            inputs["reference"],
            split=SPLIT,
            num_samples=config.tune.num_samples,
        ) | {"first_sample": config.evaluate.num_samples}
    return {
        "bound": "DDPM's, fixed_small variance, all timesteps",
        "data": inputs["preprocess"]["key"],
        "split": SPLIT,
        "num_images": config.tune.num_samples,
        "images": "spread over the split",
        "seed": config.evaluate.seed,
        "clip_x_start": config.evaluate.clip_x_start,
        "weights": "ema",
    }


def metric_name(config: Config, inputs: Inputs) -> str:
    """The score as it is called, such as `fid[classifier]`."""
    if config.tune.metric == "fid":
        return score_name("fid", inputs["features"])
    return "bits/dim (upper bound)"


@contextlib.contextmanager
def open_score(config: Config, storage: Storage, inputs: Inputs) -> Any:
    """What scores a network of this trial, with all that it needs loaded.

    Yields:
        A function of the EMA network; it raises EvaluationError where there is no finite score.
    """
    counts = None
    if config.model.class_conditional:
        counts = class_counts(read_dataset(storage, dict(inputs["preprocess"])), "train")
    diffusion = make_diffusion(config, None if counts is None else len(counts))
    if config.tune.metric == "fid":
        yield _frechet(config, storage, inputs, diffusion, counts)
        return
    items = open_split(
        storage,
        dict(inputs["preprocess"]),
        SPLIT,
        whole=False,
        cache_bytes=config.data.cache_bytes,
    )
    with contextlib.closing(items):
        yield _bits(config, items, diffusion, counts)


def _frechet(
    config: Config,
    storage: Storage,
    inputs: Inputs,
    diffusion: Any,
    counts: dict[int, int] | None,
) -> Score:
    """The Frechet distance of samples to the validation images."""
    extractor = load_extractor(storage, inputs["features"])
    sums = read_sums(read_artifact(storage, inputs["reference"], "sums.safetensors"), SPLIT)

    def score(model: Any) -> tuple[float, bytes]:
        device = next(model.parameters()).device
        with full_precision():  # as the reference
            parts = list(
                iter_drawn(
                    config,
                    Network(model, diffusion, counts),
                    extractor.to(device),
                    config.tune.num_samples,
                    config.evaluate.num_samples,
                )
            )
        value = frechet_distance(sums, sum_features(np.concatenate([f for _, f in parts])))
        if not np.isfinite(value):
            raise EvaluationError(
                "The score is not finite: the features of the samples are too large. Lower "
                "train.learning_rate, or the upper end of its range."
            )
        return value, _keep(parts[0][0])

    return score


def _bits(config: Config, items: Any, diffusion: Any, counts: dict[int, int] | None) -> Score:
    """The variational bound of validation images, in bits per dimension."""

    @torch.no_grad()
    @full_precision()
    def score(model: Any) -> tuple[float, bytes]:
        device = next(model.parameters()).device
        model.eval()
        process, chosen = diffusion.to(device), choose_items(len(items), config.tune.num_samples)
        total = 0.0
        for start in range(0, len(chosen), CHUNK):
            ids = chosen[start : start + CHUNK]
            pixels = torch.from_numpy(items.gather(ids)).to(device)
            seed = keyed_seed("bound", config.evaluate.seed, start)
            bound = variational_bound(
                process,
                model,
                pixels.float() / 127.5 - 1,
                class_labels=_labels(items, ids, process),
                clip_x_start=config.evaluate.clip_x_start,
                generator=torch.Generator().manual_seed(seed),  # the same noise on a GPU
            )
            total += float(bound.total.double().sum())
        if not np.isfinite(total):
            raise EvaluationError(
                "The bound is not finite: the network's output is not. Lower train.learning_rate, "
                "or the upper end of its range."
            )
        return total / len(chosen), _keep(_draw_shown(config, Network(model, process, counts)))

    return score


def _draw_shown(config: Config, network: Network) -> np.ndarray:
    """Samples for the eye, of a score that needs none."""
    numbers, labels = range(NUM_SHOWN), None
    if network.counts is not None:
        labels = draw_labels(network.counts, config.evaluate.seed, numbers)
    return draw_items(config, network, numbers, labels)


def _keep(items: np.ndarray) -> bytes:
    return safetensors.numpy.save({"items": np.ascontiguousarray(items[:NUM_SHOWN])})


def _labels(items: Any, ids: np.ndarray, diffusion: Any) -> Tensor | None:
    if diffusion.null_label is None:
        return None
    labels = torch.from_numpy(items.labels_of(ids))
    return labels.masked_fill(labels < 0, diffusion.null_label).to(diffusion.weights.device)
