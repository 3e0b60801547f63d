"""What a report shows of a model beside its scores, as uint8 images or float32 sequences."""

import contextlib
import json

import numpy as np
import torch
from torch import Tensor

from diffusion_core import interpolate, make_image_noise
from pipeline.copy_search import Copies
from pipeline.dataset import open_split
from pipeline.drawing import device_of
from pipeline.gallery import SHOWN, Gallery, spread_evenly
from pipeline.host import full_precision, torch_threads
from pipeline.sampling import draw_labels, quantise, sample_items
from pipeline.settings import Config
from pipeline.storage import open_storage
from pipeline.subjects import Network, Source, load_network
from pipeline.tasks import send_task
from pipeline.workflow import Resources, StepContext

STRIP_LENGTH = 10
REFERENCE_SPLIT = "test"
INTERPOLATED_AT = 0.5  # of T: far enough that the network fills in, near enough to come back
INTERPOLATION_STEPS = 50
PAIRS = 3


def draw_pictures(
    context: StepContext, source: Source, seen: Gallery, copies: Copies | None
) -> dict[str, np.ndarray]:
    """Arrays by name.

    `samples` and `real` for grids; `class-3` the samples of class 3; `copied` and `neighbours`, the
    samples nearest to training images and these; and, where there is a network, `noising`,
    `denoising` and `interpolation-0`, ...

    Args:
        context: of the step `evaluate`.
        source: of the samples.
        seen: of the samples.
        copies: where they were looked for.
    """
    config = context.config
    data, cache_bytes = dict(context.inputs["preprocess"]), config.data.cache_bytes
    test = open_split(context.storage, data, REFERENCE_SPLIT, whole=False, cache_bytes=cache_bytes)
    with contextlib.closing(test):
        numbers = np.array(spread_evenly(len(test), SHOWN))
        real, labels = test.gather(numbers), test.labels_of(numbers)
    pictures = {"samples": seen.first, "real": real}
    pictures |= {f"class-{label}": items for label, items in seen.by_class.items()}
    if copies is not None:
        pictures["copied"] = copies.samples
        pictures["neighbours"] = copies.neighbours
    if source.kind != "images":
        pictures |= send_task(
            _draw_strips,
            Resources(cpus=1, gpus=int(config.evaluate.use_gpu)),
            context.storage.uri,
            config.model_dump_json(),
            source.to_json(),
            real[: 2 * PAIRS],
            labels[: 2 * PAIRS],
        )
    return pictures


@torch.inference_mode()
def _draw_strips(
    storage_uri: str, config_json: str, source_json: str, real: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """A task: what the network makes of pairs of real items, and of noise."""
    storage, config = open_storage(storage_uri), Config.model_validate_json(config_json)
    network = load_network(storage, config, Source(**json.loads(source_json)))
    network.to(device_of(config))
    with torch_threads(1), full_precision():
        strips = {
            "noising": _noise_one(network, real[0]),
            "denoising": _denoise_one(config, network),
        }
        for k in range(len(real) // 2):
            pair = slice(2 * k, 2 * k + 2)
            strip = _interpolate(config, network, real[pair], labels[pair], seed=k)
            strips[f"interpolation-{k}"] = strip
    return strips


def _noise_one(network: Network, item: np.ndarray) -> np.ndarray:
    """An item at evenly spaced timesteps of the forward process, with one noise."""
    diffusion = network.diffusion
    t = torch.linspace(0, diffusion.num_train_timesteps - 1, STRIP_LENGTH).round().long()
    t = t.to(network.device)
    x_start = _to_x(item[None]).to(network.device).expand(STRIP_LENGTH, *item.shape)
    noise = make_image_noise(item.shape, [0])[0].to(network.device)
    return _from_x(diffusion.q_sample(x_start, t, noise.expand_as(x_start)), item.dtype)


def _denoise_one(config: Config, network: Network) -> np.ndarray:
    """The first sample on its way from noise."""
    num_steps = config.evaluate.num_steps
    labels = None
    if network.counts is not None:
        labels = draw_labels(network.counts, config.evaluate.seed, range(1))
    shown = set(np.linspace(1, num_steps, STRIP_LENGTH).round().astype(int).tolist())
    dtype = np.dtype(np.float32 if config.data.is_sequence else np.uint8)
    states: list[np.ndarray] = []

    def keep(k: int, x: Tensor) -> None:
        if k in shown:
            states.append(_from_x(x, dtype)[0])

    sample_items(
        config,
        network.model,
        range(1),
        diffusion=network.diffusion,
        class_labels=labels,
        on_step=keep,
    )
    return np.stack(states)


def _interpolate(
    config: Config, network: Network, pair: np.ndarray, labels: np.ndarray, *, seed: int
) -> np.ndarray:
    """From one real item to another: both ends as they are, and what lies between.

    A network that is told the class is told that of the nearer end.
    """
    x = _to_x(pair).to(network.device)
    noise = make_image_noise(pair.shape[1:], [seed])[0].to(network.device)
    t = int(INTERPOLATED_AT * network.diffusion.num_train_timesteps)
    weights = torch.linspace(0, 1, STRIP_LENGTH - 2)
    nearer = torch.from_numpy(labels)[(weights > 0.5).long()]
    is_told = network.counts is not None and network.counts.keys() >= set(labels.tolist())
    between = interpolate(
        network.diffusion,
        network.model,
        *(x[k : k + 1].expand(len(weights), *x.shape[1:]) for k in (0, 1)),
        t=t,
        weight=weights,
        noise=noise.expand(len(weights), *x.shape[1:]),
        num_steps=min(INTERPOLATION_STEPS, t + 1),
        clip_x_start=config.evaluate.clip_x_start,
        class_labels=nearer.to(network.device) if is_told else None,
        guidance_scale=config.evaluate.guidance_scale if is_told else 1.0,
    )
    return np.concatenate([pair[:1], _from_x(between, pair.dtype), pair[1:]])


def _to_x(items: np.ndarray) -> Tensor:
    x = torch.from_numpy(items).float()
    return x.div(127.5).sub(1) if items.dtype == np.uint8 else x


def _from_x(x: Tensor, dtype: np.dtype) -> np.ndarray:
    return quantise(x) if dtype == np.uint8 else x.cpu().numpy()
