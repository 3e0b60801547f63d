"""The noise of a training batch, and of images that are sampled from seeds."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def draw_noise(
    like: Float[Tensor, "batch channel *rest"],
    offset: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channel *rest"]:
    """Standard normal noise, plus `offset` times one normal number for each channel.

    The offset lets a network learn to move the mean of an image, which at the last step of most
    schedules still shows through the noise.

    Args:
        like: what shape, type and device to draw.
        offset: strength, 0.1 being usual; 0 draws nothing more.
        generator: the source.

    Reference: Guttenberg, Diffusion with Offset Noise (crosslabs.org, 2023).
    """
    settings = {"generator": generator, "device": like.device, "dtype": like.dtype}
    noise = torch.randn(like.shape, **settings)
    if offset == 0:
        return noise
    shared = torch.randn((*like.shape[:2], *(1 for _ in like.shape[2:])), **settings)
    return noise + offset * shared


def make_image_noise(
    shape: tuple[int, ...], seeds: Sequence[int]
) -> tuple[Float[Tensor, "batch ..."], list[torch.Generator]]:
    """Starting noise of the images with these seeds, each from a stream of its own.

    Args:
        shape: of one image, without the batch axis.
        seeds: one integer an image.

    Returns:
        The noise on the CPU, and each image's generator, to draw from during sampling.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators
