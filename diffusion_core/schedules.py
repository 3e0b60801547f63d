"""Noise schedules: how much signal and how much noise each training timestep holds.

A schedule is a pair of sequences, `x_t = signal_scale[t] x_start + noise_scale[t] noise`.
Everything is computed in float64; the process and the samplers cast once, at the point of use.
How the pair is used to noise, convert and weight is in `process.py` and `objectives.py`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

MAX_BETA = 0.999  # of schedules defined by abar(u); Nichol & Dhariwal 2021, section 3.2
NOISE_REACHED = 0.01  # abar at the last step above this: sampling starts from unseen noise


@dataclass(frozen=True)
class NoiseSchedule:
    """The signal and noise scales of every timestep, float64, t = 0 the least noisy.

    Build one with `make_schedule`, which refuses sequences that are no schedule.
    """

    name: str
    signal_scale: Float64[Tensor, " num_train_timesteps"]
    noise_scale: Float64[Tensor, " num_train_timesteps"]

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.signal_scale.shape[0]

    @property
    def snr(self) -> Float64[Tensor, " num_train_timesteps"]:
        """Signal-to-noise ratio a^2 / b^2 (a ratio, not dB)."""
        return (self.signal_scale / self.noise_scale) ** 2

    @property
    def alphas_cumprod(self) -> Float64[Tensor, " num_train_timesteps"]:
        """Abar = a^2, the share of the variance that is signal."""
        return self.signal_scale**2

    @property
    def betas(self) -> Float64[Tensor, " num_train_timesteps"]:
        """beta_t = 1 - abar_t / abar_{t-1}, with abar_{-1} = 1."""
        abar = self.alphas_cumprod
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        return 1 - abar / previous


def make_schedule(name: str, num_train_timesteps: int, **options: float | bool) -> NoiseSchedule:
    """Builds a named schedule, or refuses it with the reason.

    Args:
        name: `linear`, `scaled_linear`, `cosine` or `sigmoid`.
        num_train_timesteps: T, at least 1.
        **options: the schedule's own parameters, such as `s=0.008` of `cosine`.

    Raises:
        ValueError: the name or an option is unknown, or the values are no schedule: not finite,
            a beta outside (0, 1), or a signal that does not fall strictly.

    Warns:
        UserWarning: abar at the last step is above 0.01, so that sampling would start from
            noise that training never showed.
    """
    if name not in _BUILDERS:
        raise ValueError(
            f"schedule must be one of {', '.join(_BUILDERS)}, got {name!r}. Choose one of these."
        )
    if num_train_timesteps < 1:
        raise ValueError(
            f"num_train_timesteps must be at least 1, got {num_train_timesteps}. "
            "1000 is the usual number."
        )
    try:
        betas = _BUILDERS[name](num_train_timesteps, **options)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"schedule {name!r} cannot be computed with {_brief(options)} ({error}). "
            "Change its options."
        ) from error
    except TypeError as error:
        raise ValueError(
            f"schedule {name!r} does not take these options: {', '.join(options)} ({error}). "
            "See diffusion_core.schedules for the options of each."
        ) from error
    _refuse_invalid_betas(name, betas, options)
    abar = torch.cumprod(1 - betas, dim=0)
    if float(abar[-1]) > NOISE_REACHED:
        warnings.warn(
            f"schedule {name!r} keeps abar = {float(abar[-1]):.4f} at its last step: sampling "
            "starts from noise that training never showed. Use more steps or larger betas.",
            stacklevel=2,
        )
    return NoiseSchedule(name=name, signal_scale=abar.sqrt(), noise_scale=(1 - abar).sqrt())


def _linear(
    num_train_timesteps: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    scale_to_T: bool = True,  # noqa: N803  (T is the field's name for it)
) -> Float64[Tensor, " num_train_timesteps"]:
    # DDPM (2006.11239) section 4; scaled by 1000/T as in improved-diffusion, so that fewer
    # steps still end in noise.
    k = 1000 / num_train_timesteps if scale_to_T else 1.0
    return torch.linspace(k * beta_start, k * beta_end, num_train_timesteps, dtype=torch.float64)


def _scaled_linear(
    num_train_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float64[Tensor, " num_train_timesteps"]:
    # LDM (2112.10752): linear in sqrt(beta).
    ends = math.sqrt(beta_start), math.sqrt(beta_end)
    return torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** 2


def _cosine(num_train_timesteps: int, s: float = 0.008) -> Float64[Tensor, " num_train_timesteps"]:
    # Nichol & Dhariwal (2102.09672) eq. 17.
    return _betas_from_abar(
        num_train_timesteps, lambda u: torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    )


def _sigmoid(
    num_train_timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0
) -> Float64[Tensor, " num_train_timesteps"]:
    # Jabri et al. (2212.11972) Algorithm 1.
    low = 1 / (1 + math.exp(-start / tau))
    high = 1 / (1 + math.exp(-end / tau))
    return _betas_from_abar(
        num_train_timesteps,
        lambda u: (high - torch.sigmoid((u * (end - start) + start) / tau)) / (high - low),
    )


def _betas_from_abar(
    num_train_timesteps: int, abar: Callable[[Tensor], Tensor]
) -> Float64[Tensor, " num_train_timesteps"]:
    """beta_i = min(1 - abar((i+1)/T) / abar(i/T), 0.999); the ratio normalises by abar(0)."""
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    values = abar(u)
    return (1 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


_BUILDERS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}


def _brief(options: dict[str, float | bool]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "the defaults"


def _refuse_invalid_betas(name: str, betas: Tensor, options: dict[str, float | bool]) -> None:
    given = _brief(options)
    if not bool(torch.isfinite(betas).all()):
        raise ValueError(
            f"schedule {name!r} with {given} has betas that are not finite. Change its options."
        )
    outside = (betas <= 0) | (betas >= 1)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"schedule {name!r} with {given} and T={betas.shape[0]} has beta[{i}] = "
            f"{float(betas[i]):.4g}, and every beta must lie between 0 and 1. "
            "Raise num_train_timesteps or narrow the range."
        )
