"""Every schedule x objective x sampler x spacing against the exact chain of a Gaussian.

For data N(0, s^2) the ideal denoiser is linear, x_start = k x_t, so a sampler's output is its
noise times a gain, plus each step's noise times the gains after it. The chain is written out here
in Python floats from the formulas of the papers, independently of the package, with the very
noise that the sampler draws. Equality is to 1e-10 in float64; the limit as T grows is not
asserted.
"""

import math
import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from diffusion_core import (
    Diffusion,
    NoiseSchedule,
    make_schedule,
    make_timesteps,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
)
from diffusion_core.objectives import OBJECTIVES, Objective
from diffusion_core.samplers import Variance
from diffusion_core.timesteps import SPACINGS, Spacing

S = 0.6  # deviation of the data
TOLERANCE = 1e-10

# name -> (T -> schedule); None where no such schedule exists at that T
SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": lambda T: make_schedule("linear", T, scale_to_T=T >= 40),
    "scaled_linear": lambda T: make_schedule("scaled_linear", T),
    "cosine": lambda T: make_schedule("cosine", T),
    "sigmoid": lambda T: make_schedule("sigmoid", T),
    "sqrt": lambda T: make_schedule("sqrt", T),
    "logistic": lambda T: make_schedule("logistic", T),
    "trained_betas": lambda T: make_schedule(
        "trained_betas", T, betas=[0.01 + 0.5 * i / T for i in range(T)]
    ),
    "lerp": lambda T: make_schedule("lerp", T),
    "linear, zero terminal SNR": lambda T: SCHEDULES["linear"](T).zero_terminal_snr(),
    "cosine, shifted": lambda T: SCHEDULES["cosine"](T).shifted(base_resolution=32, resolution=64),
    "sigmoid, scaled": lambda T: SCHEDULES["sigmoid"](T).input_scaled(0.5),
}
SAMPLERS = ("ddim", "ddim eta 0.5", "ddim eta 1", "ddpm small", "ddpm large", "ddpm learned",
            "dpmpp_2m")  # fmt: skip
VARIANCES: dict[str, Variance] = {
    "ddpm small": "fixed_small", "ddpm large": "fixed_large", "ddpm learned": "learned",
}  # fmt: skip
FRACTION = 0.3  # what the network says of its variance, between the two fixed ones


def make(name: str, num_train_timesteps: int) -> NoiseSchedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some never reach noise; that is theirs to say
        return SCHEDULES[name](num_train_timesteps)


def is_valid(schedule: NoiseSchedule, objective: str) -> bool:
    """Flow belongs to lerp; noise cannot be predicted from noise alone."""
    if objective == "pred_flow":
        return schedule.name == "lerp"
    return not (objective == "pred_noise" and float(schedule.signal_scale[-1]) == 0)


def ideal_denoiser(diffusion: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
    def model(x_t: Tensor, t: Tensor) -> Tensor:
        a, b = scales(diffusion.schedule, int(t[0]))
        x_start = x_t * gain_to_data(a, b)
        output = diffusion.target(x_start, t, (x_t - a * x_start) / b)
        if not diffusion.learned_variance:
            return output
        return torch.cat([output, torch.full_like(output, 2 * FRACTION - 1)], dim=1)

    return model


def scales(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    return (
        (1.0, 0.0) if t < 0 else (float(schedule.signal_scale[t]), float(schedule.noise_scale[t]))
    )


def gain_to_data(a: float, b: float) -> float:
    return a * S**2 / (a**2 * S**2 + b**2)


def exact_chain(
    schedule: NoiseSchedule, sampler: str, steps: list[int], x: Tensor, draw: Callable[[], Tensor]
) -> Tensor:
    """The sampler's output from the papers' formulas, scalar by scalar."""
    last: tuple[float, Tensor] | None = None  # lambda and x_start of the step before
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        a, b = scales(schedule, t)
        ap, bp = scales(schedule, t_prev)
        x0 = gain_to_data(a, b) * x
        eps = (x - a * x0) / b
        beta = b**2 - (a / ap) ** 2 * bp**2
        small = beta * bp**2 / b**2
        if sampler.startswith("ddim"):
            eta = float(sampler.removeprefix("ddim eta ") if "eta" in sampler else 0)
            sigma = eta * math.sqrt(small)
            x = ap * x0 + math.sqrt(max(bp**2 - sigma**2, 0)) * eps
            if eta and t_prev >= 0:
                x = x + sigma * draw()
        elif sampler.startswith("ddpm"):
            x = ((a / ap) * bp**2 * x + ap * beta * x0) / b**2
            if t_prev >= 0:
                share = {"small": 0.0, "large": 1.0, "learned": FRACTION}[sampler.split()[1]]
                x = x + math.sqrt(small ** (1 - share) * beta**share) * draw()
        else:
            here = math.log(a / b) if a else -math.inf
            d = x0
            if last is not None and t_prev >= 0:
                r = (here - last[0]) / (math.log(ap / bp) - here)
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last[1]
            x = (bp / b) * x + (ap - bp * a / b) * d
            last = (here, x0)
    return x


def run(sampler: str, diffusion: Diffusion, x_T: Tensor, n: int, spacing: Spacing) -> Tensor:
    common = {"num_steps": n, "spacing": spacing, "clip_x_start": False}
    model, generator = ideal_denoiser(diffusion), torch.Generator().manual_seed(1)
    if sampler.startswith("ddim"):
        eta = float(sampler.removeprefix("ddim eta ") if "eta" in sampler else 0)
        return sample_ddim(diffusion, model, x_T, eta=eta, generator=generator, **common)
    if sampler.startswith("ddpm"):
        variance = VARIANCES[sampler]
        return sample_ddpm(diffusion, model, x_T, variance=variance, generator=generator, **common)
    return sample_dpmpp_2m(diffusion, model, x_T, **common)


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 3, 40])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_cell_equals_the_exact_chain(name: str, num_train_timesteps: int) -> None:
    T = num_train_timesteps
    if T == 1 and "zero terminal" in name:
        with pytest.raises(ValueError, match="needs at least 2 timesteps"):
            make(name, T)
        return
    schedule = make(name, T)
    x_T = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    cells = 0
    for objective, sampler, spacing in product(OBJECTIVES, SAMPLERS, SPACINGS):
        if not is_valid(schedule, objective):
            continue
        diffusion = Diffusion(schedule, objective, learned_variance=sampler == "ddpm learned")
        for n in sorted({1, min(2, T), min(7, T), T}):
            generator = torch.Generator().manual_seed(1)
            expected = exact_chain(
                schedule,
                sampler,
                make_timesteps(T, n, spacing).tolist(),
                x_T,
                lambda g=generator: torch.randn(x_T.shape, generator=g, dtype=torch.float64),
            )
            got = run(sampler, diffusion, x_T, n, spacing)
            assert torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE), (
                objective, sampler, spacing, n,
            )  # fmt: skip
            cells += 1
    assert cells >= 2 * len(SAMPLERS) * len(SPACINGS)


@pytest.mark.parametrize(("name", "objective"), list(product(SCHEDULES, OBJECTIVES)))
def test_invalid_cells_raise_and_say_why(name: str, objective: Objective) -> None:
    schedule = make(name, 60)
    if is_valid(schedule, objective):
        Diffusion(schedule, objective)
        return
    message = "belongs to the schedule 'lerp'" if objective == "pred_flow" else "holds no signal"
    with pytest.raises(ValueError, match=message):
        Diffusion(schedule, objective)
