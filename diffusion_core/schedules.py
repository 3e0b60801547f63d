"""Noise schedules: how much signal and how much noise each training timestep holds.

A schedule is a pair of sequences, `x_t = signal_scale[t] x_start + noise_scale[t] noise`.
Everything is computed in float64; the process and the samplers cast once, at the point of use.
How the pair is used to noise, convert and weight is in `process.py` and `objectives.py`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

MAX_BETA = 0.999  # of schedules defined by abar(u); Nichol & Dhariwal 2021, section 3.2
NOISE_REACHED = 0.01  # abar at the last step above this: sampling starts from unseen noise
VP_TOLERANCE = 1e-9

Option = float | bool | Sequence[float]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The signal and noise scales of every timestep, float64, t = 0 the least noisy.

    Variance-preserving (VP) schedules have a^2 + b^2 = 1; `lerp` has not. Build one with
    `make_schedule` or a modifier, which refuse sequences that are no schedule.

    Raises:
        ValueError: not finite, a signal or a signal-to-noise ratio that does not fall strictly,
            no signal left before the last step, or no noise at some step.
    """

    name: str
    signal_scale: Float64[Tensor, " num_train_timesteps"]
    noise_scale: Float64[Tensor, " num_train_timesteps"]

    def __post_init__(self) -> None:
        a, b = self.signal_scale, self.noise_scale
        fault = None
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            fault = "has scales that are not finite"
        elif float(b.min()) <= 0 or float(a.min()) < 0 or float(a[0]) >= 1:
            fault = "must have noise at every step and a signal between 0 and 1"
        elif bool((a.diff() >= 0).any()):
            fault = f"has a signal that does not fall at step {_first(a.diff() >= 0) + 1}"
        elif bool((self.snr.diff() >= 0).any()):
            fault = f"has an SNR that does not fall at step {_first(self.snr.diff() >= 0) + 1}"
        if fault is not None:
            raise ValueError(f"schedule {self.name!r} {fault}. Change its options.")

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.signal_scale.shape[0]

    @property
    def is_variance_preserving(self) -> bool:
        """Whether a^2 + b^2 = 1 at every step."""
        total = self.signal_scale**2 + self.noise_scale**2
        return bool(((total - 1).abs() < VP_TOLERANCE).all())

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last step is noise alone."""
        return float(self.signal_scale[-1]) == 0

    @property
    def snr(self) -> Float64[Tensor, " num_train_timesteps"]:
        """Signal-to-noise ratio a^2 / b^2 (a ratio, not dB)."""
        return (self.signal_scale / self.noise_scale) ** 2

    @property
    def alphas_cumprod(self) -> Float64[Tensor, " num_train_timesteps"]:
        """abar = a^2, the share of the variance that is signal; VP schedules only."""
        self._refuse_unless_vp("alphas_cumprod")
        return self.signal_scale**2

    @property
    def betas(self) -> Float64[Tensor, " num_train_timesteps"]:
        """beta_t = 1 - abar_t / abar_{t-1}, with abar_{-1} = 1; VP schedules only."""
        abar = self.alphas_cumprod
        return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """Shifts and scales the signal so that the last step is noise alone.

        The first step keeps its signal. A schedule of one step has nothing to keep.

        Raises:
            ValueError: not a VP schedule, or one of a single step.

        Reference: Lin et al. (2305.08891), Algorithm 1.
        """
        self._refuse_unless_vp("zero_terminal_snr")
        if self.num_train_timesteps == 1:
            raise ValueError(
                "zero_terminal_snr needs at least 2 timesteps, got 1. Train with more timesteps."
            )
        a = self.signal_scale
        a = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
        return _vp(f"{self.name}+zero_terminal_snr", a**2)

    def shifted(self, *, base_resolution: int, resolution: int) -> "NoiseSchedule":
        """Moves log SNR by 2 log(base_resolution / resolution): larger images need more noise.

        Args:
            base_resolution: the side, in pixels, that the schedule was made for.
            resolution: the side that it is to be used for.

        Raises:
            ValueError: not a VP schedule, or a resolution below 1.

        Reference: Hoogeboom et al., simple diffusion (2301.11093), on adjusting noise schedules.
        """
        self._refuse_unless_vp("shifted")
        if min(base_resolution, resolution) < 1:
            raise ValueError(
                f"resolutions must be at least 1 pixel, got {base_resolution} and {resolution}. "
                "Give the sides of the images."
            )
        return self._with_snr_times((base_resolution / resolution) ** 2, "shifted")

    def input_scaled(self, c: float) -> "NoiseSchedule":
        """Scales the input by c: SNR times c^2, brought back to variance preservation.

        x_start and clipping stay in [-1, 1]; c below 1 means more noise at every step.

        Raises:
            ValueError: not a VP schedule, or c not above 0.

        Reference: Chen (2301.10972), on input scaling.
        """
        self._refuse_unless_vp("input_scaled")
        if c <= 0:
            raise ValueError(f"input scale c must be above 0, got {c}. 1 changes nothing.")
        return self._with_snr_times(c**2, "input_scaled")

    def _with_snr_times(self, factor: float, how: str) -> "NoiseSchedule":
        signal = factor * self.signal_scale**2
        schedule = _vp(f"{self.name}+{how}", signal / (signal + self.noise_scale**2))
        _warn_unless_noise_is_reached(schedule)
        return schedule

    def _refuse_unless_vp(self, what: str) -> None:
        if not self.is_variance_preserving:
            raise ValueError(
                f"{what} is defined for variance-preserving schedules only, and {self.name!r} is "
                "none. Use signal_scale and noise_scale."
            )


def make_schedule(name: str, num_train_timesteps: int, **options: Option) -> NoiseSchedule:
    """Builds a named schedule, or refuses it with the reason.

    Args:
        name: `linear`, `scaled_linear`, `cosine`, `sigmoid`, `sqrt`, `logistic`, `lerp` or
            `trained_betas`.
        num_train_timesteps: T, at least 1.
        **options: the schedule's own parameters, such as `s=0.008` of `cosine`.

    Raises:
        ValueError: the name or an option is unknown, or the values are no schedule: not finite,
            a beta outside (0, 1) (the last may be 1), or a signal that does not fall strictly.

    Warns:
        UserWarning: abar at the last step is above 0.01, so that sampling would start from
            noise that training never showed.
    """
    if name not in _BUILDERS and name != "lerp":
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}. Choose one of these."
        )
    if num_train_timesteps < 1 or num_train_timesteps != int(num_train_timesteps):
        raise ValueError(
            f"num_train_timesteps must be a whole number from 1 on, got {num_train_timesteps}. "
            "1000 is the usual number."
        )
    try:
        if name == "lerp":
            return _lerp(num_train_timesteps, **options)
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
    schedule = _vp(name, torch.cumprod(1 - betas, dim=0))
    _warn_unless_noise_is_reached(schedule)
    return schedule


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
    if min(beta_start, beta_end) < 0:  # they have no root: refused with the other invalid ones
        return torch.full((num_train_timesteps,), min(beta_start, beta_end), dtype=torch.float64)
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


def _sqrt(num_train_timesteps: int, s: float = 1e-4) -> Float64[Tensor, " num_train_timesteps"]:
    # Diffusion-LM (2205.14217) section 4.2: abar itself falls with sqrt(u), not the betas.
    if not 0 < s < 1 / num_train_timesteps:
        raise ValueError(
            f"schedule 'sqrt' needs 0 < s < 1/T = {1 / num_train_timesteps:.4g}, got s={s}: above "
            "it the signal ends before the last step. Lower s or T."
        )
    return _betas_from_abar(num_train_timesteps, lambda u: 1 - torch.sqrt(u + s))


def _logistic(
    num_train_timesteps: int, beta_start: float = 1e-5, beta_end: float = 5e-3
) -> Float64[Tensor, " num_train_timesteps"]:
    # The introductory S-curve demo; diffusers calls it `sigmoid`.
    rise = torch.sigmoid(torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64))
    return rise * (beta_end - beta_start) + beta_start


def _trained_betas(
    num_train_timesteps: int, betas: Sequence[float]
) -> Float64[Tensor, " num_train_timesteps"]:
    # What an imported checkpoint carries.
    if len(betas) != num_train_timesteps:
        raise ValueError(
            f"schedule 'trained_betas' needs num_train_timesteps = {num_train_timesteps} betas, "
            f"got {len(betas)}. Make them equally many."
        )
    return torch.tensor(betas, dtype=torch.float64)


def _lerp(num_train_timesteps: int) -> NoiseSchedule:
    # Linear interpolation of image and noise: the rectified-flow path (2209.03003).
    noise = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    return NoiseSchedule("lerp", 1 - noise, noise)


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
    "sqrt": _sqrt,
    "logistic": _logistic,
    "trained_betas": _trained_betas,
}
SCHEDULES: tuple[str, ...] = (*_BUILDERS, "lerp")


def _vp(name: str, abar: Tensor) -> NoiseSchedule:
    return NoiseSchedule(name, abar.sqrt(), (1 - abar).sqrt())


def _warn_unless_noise_is_reached(schedule: NoiseSchedule) -> None:
    left = float(schedule.alphas_cumprod[-1])
    if left > NOISE_REACHED:
        warnings.warn(
            f"schedule {schedule.name!r} keeps abar = {left:.4f} at its last step: sampling starts "
            "from noise that training never showed. Use more steps or larger betas.",
            stacklevel=3,
        )


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])


def _brief(options: dict[str, Option]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "the defaults"


def _refuse_invalid_betas(name: str, betas: Tensor, options: dict[str, Option]) -> None:
    given = "these betas" if name == "trained_betas" else _brief(options)
    if not bool(torch.isfinite(betas).all()):
        raise ValueError(
            f"schedule {name!r} with {given} has betas that are not finite. Change its options."
        )
    outside = (betas <= 0) | (betas >= 1)
    outside[-1] = bool(betas[-1] <= 0) or bool(betas[-1] > 1)  # 1 is zero terminal SNR
    if bool(outside.any()):
        i = _first(outside)
        raise ValueError(
            f"schedule {name!r} with {given} and T={betas.shape[0]} has beta[{i}] = "
            f"{float(betas[i]):.4g}, and every beta must lie between 0 and 1. "
            "Raise num_train_timesteps or narrow the range."
        )
