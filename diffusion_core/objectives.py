"""Objectives and loss weightings: what a network predicts, and how much each step counts.

The targets and conversions themselves are methods of `process.Diffusion`.
"""

import warnings
from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion_core.schedules import NoiseSchedule

Objective = Literal["pred_noise", "pred_x0", "pred_v", "pred_flow"]
Weighting = Literal["uniform", "snr", "min_snr", "vlb"]

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def check_objective(schedule: NoiseSchedule, objective: str) -> None:
    """Refuses an objective that the schedule gives no meaning to.

    Raises:
        ValueError: unknown; `pred_flow` on a variance-preserving schedule; `pred_noise` where
            the last step holds no signal, for x_start cannot be had from noise alone.
    """
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}. "
            "Choose one of these."
        )
    a, b = schedule.signal_scale, schedule.noise_scale
    is_straight = torch.allclose(a + b, torch.ones_like(a))  # lerp of one step is VP as well
    if objective == "pred_flow" and schedule.is_variance_preserving and not is_straight:
        raise ValueError(
            f"objective 'pred_flow' belongs to the schedule 'lerp', got {schedule.name!r}, which "
            "is variance preserving. Use pred_v with it."
        )
    if objective == "pred_noise" and schedule.has_zero_terminal_snr:
        raise ValueError(
            f"objective 'pred_noise' cannot start from {schedule.name!r}, whose last step holds "
            "no signal: x_start would be divided by 0. Use pred_v."
        )


def loss_weights(
    schedule: NoiseSchedule, objective: Objective, weighting: Weighting, gamma: float = 5.0
) -> Float64[Tensor, " num_train_timesteps"]:
    """The factor on the squared error of `objective` at each timestep, finite everywhere.

    `uniform` is 1. The others are defined by their weight on x_start's error and carried over to
    the objective's own: `snr` (SNR, which makes every loss the noise loss), `min_snr`
    (min(SNR, gamma)), `vlb` ((SNR_{t-1} - SNR_t)/2; at t = 0, where that is infinite, the
    posterior variance of step 1 stands in, as in improved-diffusion).

    Raises:
        ValueError: an unknown weighting, or a gamma that is not above 0.

    Warns:
        UserWarning: `snr` or `min_snr` where the last step holds no signal: the step at which
            sampling starts gets weight 0.

    Reference: Hang et al., Min-SNR (2303.09556), section 3.4; Ho et al., DDPM (2006.11239),
        eqs. 5 and 8, and Kingma et al., VDM (2107.00630), section 4, for `vlb`.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(
            f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}. "
            "Choose one of these."
        )
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}. 5 is the usual value.")
    if weighting == "uniform":
        return torch.ones_like(schedule.signal_scale)
    if weighting in ("snr", "min_snr") and schedule.has_zero_terminal_snr:
        warnings.warn(
            f"weighting {weighting!r} gives weight 0 to the last step of {schedule.name!r}, where "
            "sampling starts. Use uniform.",
            stacklevel=2,
        )
    a, b, snr = schedule.signal_scale, schedule.noise_scale, schedule.snr
    match weighting:
        case "snr":
            on_x_start = snr
        case "min_snr":
            on_x_start = snr.clamp(max=gamma)
        case "vlb":
            on_x_start = torch.cat([_first_vlb_weight(schedule), (snr[:-1] - snr[1:]) / 2])
    match objective:  # how an error of the output shows in x_start, squared
        case "pred_noise":
            return on_x_start / snr
        case "pred_x0":
            return on_x_start
        case "pred_v":
            return on_x_start * b**2 / (a**2 + b**2) ** 2
        case "pred_flow":
            return on_x_start * b**2 / (a + b) ** 2


def _first_vlb_weight(schedule: NoiseSchedule) -> Float64[Tensor, " 1"]:
    """1/(2 var), var the posterior variance of step 1, or of the noise itself where T = 1."""
    a, b = schedule.signal_scale, schedule.noise_scale
    if schedule.num_train_timesteps == 1:
        return 1 / (2 * b**2)
    alpha = a[1] / a[0]
    variance = (b[1] ** 2 - alpha**2 * b[0] ** 2) * b[0] ** 2 / b[1] ** 2
    return (1 / (2 * variance))[None]
