"""The variational bound in bits per dimension: a likelihood that compares schedules.

A training loss cannot: its scale depends on schedule and weighting. The model is the ancestral
sampler of `samplers.ddpm_step` over all T steps, with the discretised decoder of 8-bit data.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion_core.posterior import (
    decoder_bits,
    kl_bits,
    learned_log_variance,
    posterior,
    scales_at,
    variance_bounds,
)
from diffusion_core.process import Denoiser, Diffusion
from diffusion_core.samplers import Variance, check_variance


class Bound(NamedTuple):
    """An upper bound on -log2 p(x_start) per dimension, by its three terms, for each sample."""

    prior: Float[Tensor, " batch"]  # KL(q(x_T | x_start) || N(0, 1)); 0 where noise is reached
    kl: Float[Tensor, " batch"]  # the sum over t >= 1 of KL(q(x_{t-1} | x_t, x_start) || p)
    decoder: Float[Tensor, " batch"]  # -log2 p(x_start | x_0), over 256 bins

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The bound itself."""
        return self.prior + self.kl + self.decoder


@torch.no_grad()
def variational_bound(
    diffusion: Diffusion,
    model: Denoiser,
    x_start: Float[Tensor, "batch ..."],
    *,
    variance: Variance = "fixed_small",
    class_labels: Int64[Tensor, " batch"] | None = None,
    clip_x_start: bool = True,
    generator: torch.Generator | None = None,
) -> Bound:
    """The bound of each sample in bits per dimension, by T evaluations of the network.

    One noise is drawn at each step, so the value is an unbiased estimate. A self-conditioned
    network is shown no guess.

    Args:
        diffusion: the process.
        model: called as `model(x_t, t)`.
        x_start: 8-bit data in [-1, 1]: multiples of 2/255 from -1.
        variance: of the model's steps. At t = 0 `fixed_small` would be 0: the posterior variance
            of step 1 stands in, or beta where T = 1.
        class_labels: one for each sample.
        clip_x_start: clamp the predicted clean data to [-1, 1].
        generator: the source of the noise, on any device: one of the CPU draws the same for all.

    Raises:
        ValueError: an unknown variance, or `learned` where the process has none.

    Reference: Ho et al., DDPM (2006.11239), eqs. 5 and 13; Nichol & Dhariwal (2102.09672),
        section 3.1, for the variance at t = 0.
    """
    check_variance(diffusion, variance)
    schedule = diffusion.schedule
    last = schedule.num_train_timesteps - 1
    a, b = scales_at(schedule, last)
    prior = kl_bits((a * x_start) ** 2, 2 * math.log(b), 0.0)
    kl, decoder = torch.zeros_like(prior), torch.zeros_like(prior)
    for t in range(last, -1, -1):
        t_batch = torch.full((x_start.shape[0],), t, dtype=torch.int64, device=x_start.device)
        place = x_start.device if generator is None else generator.device
        noise = torch.randn(
            x_start.shape, generator=generator, device=place, dtype=x_start.dtype
        ).to(x_start.device)
        x_t = diffusion.q_sample(x_start, t_batch, noise)
        prediction, fraction = diffusion.predict_with_variance(
            model, x_t, t_batch, class_labels=class_labels, clip_x_start=clip_x_start
        )
        small, large = map(math.log, variance_bounds(schedule, t, t - 1))
        log_variance = torch.as_tensor(small if variance == "fixed_small" else large)
        if variance == "learned" and fraction is not None:
            log_variance = learned_log_variance(fraction, small, large)
        if t > 0:
            q = posterior(schedule, t, t - 1)
            gap = q.on_x_start * (x_start - prediction.pred_x_start)
            kl += kl_bits(gap**2, math.log(q.variance), log_variance.to(gap))
        else:
            std = (log_variance.to(x_start) / 2).exp()
            decoder = decoder_bits(x_start, prediction.pred_x_start, std)
    return Bound(prior, kl, decoder)
