"""Objectives and loss weightings: what a network predicts, and how much each step counts.

The targets and conversions themselves are methods of `process.Diffusion`.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion_core.schedules import NoiseSchedule

Objective = Literal["pred_noise", "pred_x0", "pred_v"]
Weighting = Literal["uniform", "snr", "min_snr"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def loss_weights(
    schedule: NoiseSchedule, objective: Objective, weighting: Weighting, gamma: float = 5.0
) -> Float64[Tensor, " num_train_timesteps"]:
    """The factor on the squared error of `objective` at each timestep.

    `uniform` is 1 everywhere. `snr` makes every objective's loss equal to the noise loss.
    `min_snr` caps the weight on x_start's loss at gamma.

    Raises:
        ValueError: an unknown weighting, or a gamma that is not above 0.

    Reference: Hang et al., Min-SNR (2303.09556), section 3.4.
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
    snr = schedule.snr
    x_start_weight = snr if weighting == "snr" else snr.clamp(max=gamma)
    q = schedule.signal_scale**2 + schedule.noise_scale**2
    match objective:
        case "pred_noise":
            return x_start_weight / snr
        case "pred_x0":
            return x_start_weight
        case "pred_v":
            return x_start_weight * schedule.noise_scale**2 / q**2
