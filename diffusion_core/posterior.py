"""The Gaussian posterior of a step, its variance, and divergences in bits per dimension.

Everything here is about one step t -> p of a schedule, given as integers; what a network makes
of it is in `process.py`, the sum over all steps in `bound.py`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion_core.schedules import NoiseSchedule

HALF_BIN = 1 / 255  # 8-bit data in [-1, 1]: neighbours are 2/255 apart
SMALLEST = 1e-12  # probability of a bin: its logarithm must stay finite


class Posterior(NamedTuple):
    """q(x_p | x_t, x_start) of one step t -> p: mean = on_x_t x_t + on_x_start x_start."""

    on_x_t: float
    on_x_start: float
    variance: float
    beta: float  # b_t^2 - alpha^2 b_p^2, the step's own noise; DDPM's beta_t on adjacent steps


def scales_at(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    """a_t and b_t of one timestep as floats; t = -1 is the data itself: (1, 0)."""
    if t < 0:
        return 1.0, 0.0
    return float(schedule.signal_scale[t]), float(schedule.noise_scale[t])


def posterior(schedule: NoiseSchedule, t: int, t_prev: int) -> Posterior:
    """The Gaussian posterior of any pair of scales and any p < t.

    alpha = a_t / a_p, beta = b_t^2 - alpha^2 b_p^2, mean = (alpha b_p^2 x_t + a_p beta x_start) /
    b_t^2, variance = beta b_p^2 / b_t^2. At t_prev = -1 the mean is x_start and the variance 0.

    Reference: Ho et al., DDPM (2006.11239), eqs. 6-7, where p = t - 1 and the pair is VP.
    """
    a_t, b_t = scales_at(schedule, t)
    a_p, b_p = scales_at(schedule, t_prev)
    alpha = a_t / a_p
    beta = b_t**2 - alpha**2 * b_p**2
    return Posterior(
        on_x_t=alpha * b_p**2 / b_t**2,
        on_x_start=a_p * beta / b_t**2,
        variance=beta * b_p**2 / b_t**2,
        beta=beta,
    )


def variance_bounds(schedule: NoiseSchedule, t: int, t_prev: int) -> tuple[float, float]:
    """The smallest and largest sensible variance of a step: the posterior's, and beta.

    Into the data (t_prev = -1), where the posterior's is 0, that of step 1 stands in, or beta
    where T = 1, so that its logarithm is finite.

    Reference: Ho et al., DDPM (2006.11239), section 3.2; Nichol & Dhariwal (2102.09672), section
        3.1, for the step into the data.
    """
    q = posterior(schedule, t, t_prev)
    if t_prev >= 0:
        return q.variance, q.beta
    if schedule.num_train_timesteps == 1:
        return q.beta, q.beta
    return posterior(schedule, 1, 0).variance, q.beta


def learned_log_variance(
    fraction: Float[Tensor, "batch ..."],
    log_small: float | Float[Tensor, "batch ..."],
    log_large: float | Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch ..."]:
    """log variance = f log_large + (1 - f) log_small, f what the network put out.

    Reference: Nichol & Dhariwal (2102.09672), eq. 15.
    """
    return fraction * log_large + (1 - fraction) * log_small


def kl_bits(
    gap_squared: Float[Tensor, "batch ..."],
    log_variance_1: float | Float[Tensor, "..."],
    log_variance_2: float | Float[Tensor, "..."],
) -> Float[Tensor, " batch"]:
    """KL(N(m1, var_1) || N(m2, var_2)) in bits per dimension, from (m1 - m2)^2.

    Reference: Ho et al., DDPM (2006.11239), eq. 5, its middle terms.
    """
    log_1 = torch.as_tensor(log_variance_1, dtype=gap_squared.dtype, device=gap_squared.device)
    log_2 = torch.as_tensor(log_variance_2, dtype=gap_squared.dtype, device=gap_squared.device)
    nats = 0.5 * (log_2 - log_1 + (log_1 - log_2).exp() + gap_squared * (-log_2).exp() - 1)
    return nats.flatten(1).mean(1) / math.log(2)


def decoder_bits(
    x_start: Float[Tensor, "batch ..."],
    mean: Float[Tensor, "batch ..."],
    std: float | Float[Tensor, "..."],
) -> Float[Tensor, " batch"]:
    """-log2 of the Gaussian's mass on the bin of 8-bit data around x_start, per dimension.

    The outer bins are open-ended.

    Reference: Ho et al., DDPM (2006.11239), eq. 13.
    """
    dtype = x_start.dtype
    x_start, mean = x_start.double(), mean.double()  # in float32 the tails are 0 from 6 std on
    above = torch.special.ndtr((x_start + HALF_BIN - mean) / std)
    below = torch.special.ndtr((x_start - HALF_BIN - mean) / std)
    above = torch.where(x_start > 1 - HALF_BIN, torch.ones_like(above), above)
    below = torch.where(x_start < -1 + HALF_BIN, torch.zeros_like(below), below)
    return -(above - below).clamp(min=SMALLEST).log2().flatten(1).mean(1).to(dtype)


def make_step_constants(schedule: NoiseSchedule) -> Float64[Tensor, "4 num_train_timesteps"]:
    """What `step_bits` needs of every t: the posterior's coefficient of x_start, its log
    variance, and the logs of the variance's bounds.
    """
    rows = []
    for t in range(schedule.num_train_timesteps):
        small, large = map(math.log, variance_bounds(schedule, t, t - 1))
        q = posterior(schedule, t, t - 1)
        rows.append([q.on_x_start, math.log(q.variance) if t > 0 else small, small, large])
    return torch.tensor(rows, dtype=torch.float64).T


def step_bits(
    constants: Float[Tensor, "4 num_train_timesteps"],
    x_start: Float[Tensor, "batch ..."],
    pred_x_start: Float[Tensor, "batch ..."],
    fraction: Float[Tensor, "batch ..."],
    t: Int64[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """The variational bound's term of each sample's step t -> t - 1, in bits per dimension.

    Args:
        constants: of the schedule, by `make_step_constants`.
        x_start: the truth.
        pred_x_start: the network's word on it.
        fraction: where between its bounds the log variance lies.
        t: 0-based; the step from 0 is the decoder of 8-bit data.

    Reference: Ho et al., DDPM (2006.11239), eq. 5, one of its terms.
    """
    shape = (-1,) + (1,) * (x_start.ndim - 1)
    on_x_start, log_posterior, log_small, log_large = (row[t].view(shape) for row in constants)
    log_variance = learned_log_variance(fraction, log_small, log_large)
    kl = kl_bits((on_x_start * (x_start - pred_x_start)) ** 2, log_posterior, log_variance)
    decoder = decoder_bits(x_start, pred_x_start, (log_variance / 2).exp())
    return torch.where(t == 0, decoder, kl)
