"""Samplers: from noise to data. A pure step taking t and t_prev, and a loop over a list.

The previous timestep is read from the list, never recomputed with a stride.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.process import Denoiser, Diffusion, Prediction, posterior_variance, scales_at
from diffusion_core.timesteps import Spacing, make_timesteps

CHUNK = 64  # images drawn together; image k is the same however chunks are spread


def ddim_step(
    diffusion: Diffusion,
    prediction: Prediction,
    t: int,
    t_prev: int,
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "batch ..."] | None = None,
) -> Float[Tensor, "batch ..."]:
    """One DDIM step: x_p = a_p x0 + sqrt(b_p^2 - sigma^2) noise_hat + sigma z.

    sigma^2 is eta^2 times the posterior variance; the last step (t_prev = -1) adds no noise.

    Args:
        diffusion: the process.
        prediction: the network's word on x_t.
        t: the present timestep.
        t_prev: the next one to visit, -1 for the data.
        eta: 0 is deterministic, 1 is ancestral sampling.
        noise: z, needed when eta is above 0.

    Raises:
        ValueError: eta outside [0, 1], or above 0 and no noise given.

    Reference: Song et al., DDIM (2010.02502), eqs. 12 and 16.
    """
    _check_eta(eta)
    a_prev, b_prev = scales_at(diffusion.schedule, t_prev)
    variance = eta**2 * posterior_variance(diffusion.schedule, t, t_prev)
    direction = math.sqrt(max(b_prev**2 - variance, 0.0))
    x_prev = a_prev * prediction.pred_x_start + direction * prediction.pred_noise
    if variance > 0:
        if noise is None:
            raise ValueError("eta above 0 needs noise at every step. Pass noise or a generator.")
        x_prev = x_prev + math.sqrt(variance) * noise
    return x_prev


@torch.inference_mode()
def sample_ddim(
    diffusion: Diffusion,
    model: Denoiser,
    x_T: Float[Tensor, "batch ..."],  # noqa: N803  (the field's name for the starting noise)
    *,
    num_steps: int,
    spacing: Spacing = "trailing",
    eta: float = 0.0,
    clip_x_start: bool = True,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "batch ..."]:
    """Samples with DDIM from the noise x_T.

    Args:
        diffusion: the process the network was trained for.
        model: called as `model(x_t, t)`.
        x_T: standard normal noise, one row an image.
        num_steps: how many steps to take, 1..T.
        spacing: where they lie.
        eta: 0 is deterministic, 1 is ancestral sampling.
        clip_x_start: clamp the predicted clean data to [-1, 1] at every step.
        generator: the source of the noise when eta is above 0: one, or one for each image.
        on_step: called after each step with the number of steps taken and x.

    Returns:
        The samples, the shape of x_T, in [-1, 1] when clipped.

    Raises:
        ValueError: num_steps, spacing or eta out of range; eta above 0 without a generator.
    """
    _check_eta(eta)
    steps = make_timesteps(diffusion.num_train_timesteps, num_steps, spacing).tolist()
    x = x_T
    for k, (t, t_prev) in enumerate(zip(steps, [*steps[1:], -1], strict=True), start=1):
        t_batch = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        prediction = diffusion.predict(model, x, t_batch, clip_x_start=clip_x_start)
        noise = None if eta == 0 or t_prev < 0 else _draw_noise(x, generator)
        x = ddim_step(diffusion, prediction, t, t_prev, eta=eta, noise=noise)
        if on_step is not None:
            on_step(k, x)
    return x


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


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}. 0 is deterministic.")


def _draw_noise(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    if generator is None:
        raise ValueError("eta above 0 needs a generator to draw noise from. Pass generator=.")
    if isinstance(generator, list):
        rows = [torch.randn(x.shape[1:], generator=g, device=g.device) for g in generator]
        return torch.stack(rows).to(x)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
