"""Samples from a trained network, each from the noise of its own seed."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from diffusion_core import Diffusion, UNet, make_image_noise, sample_ddim
from pipeline.loader import SEED_BITS, keyed_seed
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

    A number's sample is the same in whatever company, on a GPU but for rounding.

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


def draw_labels(counts: Mapping[int, int], seed: int, numbers: Iterable[int]) -> Tensor:
    """The label of each of these samples, int64: drawn as an image of the data set is, each alone.

    So the samples of a network that is told the class are independent, as the reference's images
    are. Were each class as frequent among them as in the data set, they would vary less than real
    images do: their distance would lie below that of real images, and KID below 0.

    Args:
        counts: of the training images by label.
        seed: `evaluate.seed`.
        numbers: of the samples; a number's label is always the same.
    """
    labels = np.array(sorted(counts))
    ends = np.cumsum([counts[label] for label in labels])
    places = [keyed_seed("label", seed, number) * int(ends[-1]) >> SEED_BITS for number in numbers]
    return torch.from_numpy(labels[np.searchsorted(ends, places, side="right")])
