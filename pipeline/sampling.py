"""Samples from a trained network, each from the noise of its own seed."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from diffusion_core import Diffusion, UNet, make_image_noise, sample_ddim
from pipeline.loader import keyed_seed
from pipeline.models import make_diffusion
from pipeline.settings import Config


def sample_items(
    config: Config,
    model: UNet,
    numbers: range,
    *,
    diffusion: Diffusion | None = None,
    class_labels: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The samples with these numbers by DDIM, float32 [N, *shape]; images lie in [-1, 1].

    A number's sample is the same in whatever company.

    Args:
        config: shape, process and the settings of `evaluate`.
        model: the network; it is put in eval mode.
        numbers: of the samples.
        diffusion: the process, where it is not the config's.
        class_labels: int64 [N], for a network that is told the class.
        on_step: told the number of steps done and the samples at each.
    """
    settings = config.evaluate
    device = next(model.parameters()).device
    seeds = [keyed_seed("sample", settings.seed, number) for number in numbers]
    noise, generators = make_image_noise(config.data.shape, seeds)
    if not config.data.is_sequence:
        noise = noise.contiguous(memory_format=torch.channels_last)
    return sample_ddim(
        (diffusion or make_diffusion(config, model.config.num_classes)).to(device),
        model.eval(),
        noise.to(device),
        num_steps=settings.num_steps,
        spacing=settings.spacing,
        eta=settings.eta,
        clip_x_start=settings.clip_x_start,
        class_labels=None if class_labels is None else class_labels.to(device),
        guidance_scale=1.0 if class_labels is None else settings.guidance_scale,
        generator=generators,
        on_step=on_step,
    )


def quantise(x: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8, by rounding: what is stored and scored."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def spread_labels(counts: Mapping[int, int], numbers: range, num_samples: int) -> Tensor:
    """The label of each of these samples, int64: all together as frequent as in the data set.

    Args:
        counts: of the training images by label.
        numbers: of the samples, out of 0..num_samples - 1.
        num_samples: in all.
    """
    labels = np.array(sorted(counts))
    ends = np.cumsum([counts[label] for label in labels])
    # Neighbours should differ: a stride without a common divisor goes through all numbers.
    golden = range(max(1, round(0.618 * num_samples)), 0, -1)
    stride = next(k for k in golden if math.gcd(k, num_samples) == 1)
    places = (np.array(numbers) * stride % num_samples + 0.5) * ends[-1] / num_samples
    return torch.from_numpy(labels[np.searchsorted(ends, places, side="right")])
