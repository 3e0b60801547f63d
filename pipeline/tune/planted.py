"""A search whose answer is known: Gaussian data, the exact denoiser, and few steps of DDIM.

For data N(0, diag(s^2)) the best guess of the clean data is linear in x_t, so that every step of
DDIM multiplies each dimension by a number, and the samples are Gaussian too. Their distance to the
data is a function of the schedule in closed form: nothing is trained and nothing is drawn.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_core import NoiseSchedule, make_schedule, make_timesteps
from pipeline.tune.space import schedule_options

STDS = (0.15, 0.5, 1.0)  # of the data, one a dimension
NUM_TRAIN_TIMESTEPS, NUM_STEPS = 100, 10


def sampled_stds(
    schedule: NoiseSchedule, stds: Sequence[float] = STDS, num_steps: int = NUM_STEPS
) -> np.ndarray:
    """The standard deviations of what DDIM draws with the exact denoiser, one a dimension.

    A step takes x_t to a' x_0 + b' (x_t - a x_0) / b with x_0 = a s^2 / (a^2 s^2 + b^2) x_t, from
    noise of deviation 1; after the last one a' = 1 and b' = 0.

    Args:
        schedule: the process.
        stds: of the data.
        num_steps: of DDIM, with trailing spacing and eta 0.

    Reference: Song et al., DDIM (2010.02502), eq. 12, with sigma = 0.
    """
    steps = make_timesteps(schedule.num_train_timesteps, num_steps, "trailing").tolist()
    a, b = schedule.signal_scale.numpy(), schedule.noise_scale.numpy()
    s2, factor = np.array(stds) ** 2, np.ones(len(stds))
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        a_prev, b_prev = (1.0, 0.0) if t_prev < 0 else (a[t_prev], b[t_prev])
        x_start = a[t] * s2 / (a[t] ** 2 * s2 + b[t] ** 2)
        factor *= a_prev * x_start + b_prev * (1 - a[t] * x_start) / b[t]
    return np.abs(factor)


def planted_score(schedule: NoiseSchedule) -> float:
    """The Frechet distance of the samples to the data: the sum of (sigma - s)^2.

    Reference: Heusel et al. (1706.08500), eq. 6, for diagonal covariances.
    """
    return float(((sampled_stds(schedule) - np.array(STDS)) ** 2).sum())


def planted_trial(trial: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """What a trial of Ray Tune runs in place of a training: it scores its choice in closed form.

    Args:
        trial: of Ray Tune: the choice, with other things.
        common: what a training would need.
    """
    from ray import tune

    step = common["rungs"][-1]
    score = score_of_choice(trial)
    rung = {"step": step, "images_seen": step, "value": score, "train_s": 0.0, "score_s": 0.0}
    tune.report({"score": score, "images_seen": step, "rung": rung})


def score_of_choice(choice: Mapping[str, Any]) -> float:
    """The score of a choice of a schedule; infinite where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signal that is left at the end shows in the score
        try:
            options = schedule_options(choice)
            schedule = make_schedule(choice["schedule"], NUM_TRAIN_TIMESTEPS, **options)
        except ValueError:
            return float("inf")
    return planted_score(schedule)
