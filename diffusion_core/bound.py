"""The variational bound in bits per dimension: a likelihood that compares schedules.

A training loss cannot: its scale depends on schedule and weighting. The model is the ancestral
sampler of `samplers.ddpm_step` over all T steps, with the discretised decoder of 8-bit data.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.process import Denoiser, Diffusion, posterior, scales_at
from diffusion_core.samplers import VARIANCES, Variance

HALF_BIN = 1 / 255  # 8-bit data in [-1, 1]: neighbours are 2/255 apart
SMALLEST = 1e-12  # probability of a bin: its logarithm must stay finite


class Bound(NamedTuple):
    """An upper bound on -log2 p(x_start) per dimension, by its three terms, for each sample."""

    prior: Float[Tensor, " batch"]  # KL(q(x_T | x_start) || N(0, 1)); 0 where noise is reached
    kl: Float[Tensor, " batch"]  # the sum over t >= 1 of KL(q(x_{t-1} | x_t, x_start) || p)
    decoder: Float[Tensor, " batch"]  # -log2 p(x_start | x_0), over 256 bins

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The bound itself."""
        return self.prior + self.kl + self.decoder


@torch.inference_mode()
def variational_bound(
    diffusion: Diffusion,
    model: Denoiser,
    x_start: Float[Tensor, "batch ..."],
    *,
    variance: Variance = "fixed_small",
    clip_x_start: bool = True,
    generator: torch.Generator | None = None,
) -> Bound:
    """The bound of each sample in bits per dimension, by T evaluations of the network.

    One noise is drawn at each step, so the value is an unbiased estimate.

    Args:
        diffusion: the process.
        model: called as `model(x_t, t)`.
        x_start: 8-bit data in [-1, 1]: multiples of 2/255 from -1.
        variance: of the model's steps. At t = 0 `fixed_small` would be 0: the posterior variance
            of step 1 stands in, or beta where T = 1.
        clip_x_start: clamp the predicted clean data to [-1, 1].
        generator: the source of the noise, on x_start's device.

    Raises:
        ValueError: an unknown variance.

    Reference: Ho et al., DDPM (2006.11239), eqs. 5 and 13; Nichol & Dhariwal (2102.09672),
        section 3.1, for the variance at t = 0.
    """
    if variance not in VARIANCES:
        raise ValueError(
            f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}. "
            "Choose one of these."
        )
    schedule = diffusion.schedule
    last = schedule.num_train_timesteps - 1
    a, b = scales_at(schedule, last)
    prior = _normal_kl((a * x_start) ** 2, b**2, 1.0)
    kl, decoder = torch.zeros_like(prior), torch.zeros_like(prior)
    for t in range(last, -1, -1):
        t_batch = torch.full((x_start.shape[0],), t, dtype=torch.int64, device=x_start.device)
        noise = torch.randn(
            x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype
        )
        x_t = diffusion.q_sample(x_start, t_batch, noise)
        prediction = diffusion.predict(model, x_t, t_batch, clip_x_start=clip_x_start)
        q = posterior(schedule, t, t - 1)
        if t > 0:
            gap = q.on_x_start * (x_start - prediction.pred_x_start)
            kl += _normal_kl(gap**2, q.variance, q.variance if _is_small(variance) else q.beta)
        else:
            var = posterior(schedule, 1, 0).variance if _is_small(variance) and last else q.beta
            decoder = _decoder_bits(x_start, prediction.pred_x_start, math.sqrt(var))
    return Bound(prior, kl, decoder)


def _is_small(variance: Variance) -> bool:
    return variance == "fixed_small"


def _normal_kl(gap_squared: Tensor, var_1: float, var_2: float) -> Float[Tensor, " batch"]:
    """KL(N(m1, var_1) || N(m2, var_2)) in bits per dimension, from (m1 - m2)^2."""
    nats = 0.5 * (math.log(var_2 / var_1) + (var_1 + gap_squared) / var_2 - 1)
    return nats.flatten(1).mean(1) / math.log(2)


def _decoder_bits(x_start: Tensor, mean: Tensor, std: float) -> Float[Tensor, " batch"]:
    """-log2 of the Gaussian's mass on the bin around x_start; the outer bins are open-ended."""
    above = torch.special.ndtr((x_start + HALF_BIN - mean) / std)
    below = torch.special.ndtr((x_start - HALF_BIN - mean) / std)
    above = torch.where(x_start > 1 - HALF_BIN, torch.ones_like(above), above)
    below = torch.where(x_start < -1 + HALF_BIN, torch.zeros_like(below), below)
    return -(above - below).clamp(min=SMALLEST).log2().flatten(1).mean(1)
