"""Samplers against the exact denoiser of a Gaussian, whose chain is known in closed form."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion_core import Diffusion, make_image_noise, make_schedule, make_timesteps, sample_ddim
from diffusion_core.objectives import OBJECTIVES, Objective
from diffusion_core.process import scales_at
from diffusion_core.timesteps import SPACINGS, Spacing

SCHEDULE = make_schedule("cosine", 100)
DATA_STD = 0.6


def gaussian_denoiser(diffusion: Diffusion):
    """The ideal network for data N(0, DATA_STD^2): E[x_start | x_t] is linear in x_t."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        a, b = scales_at(diffusion.schedule, int(t[0]))
        x_start = x_t * a * DATA_STD**2 / (a**2 * DATA_STD**2 + b**2)
        noise = (x_t - a * x_start) / b
        return diffusion.target(x_start, t, noise)

    return model


def closed_form_gain(num_steps: int, spacing: Spacing) -> float:
    """DDIM's output over its input: the product over the steps of (a_p k + b_p (1 - a k) / b)."""
    steps = make_timesteps(SCHEDULE.num_train_timesteps, num_steps, spacing).tolist()
    gain = 1.0
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        a, b = scales_at(SCHEDULE, t)
        a_prev, b_prev = scales_at(SCHEDULE, t_prev)
        k = a * DATA_STD**2 / (a**2 * DATA_STD**2 + b**2)
        gain *= a_prev * k + b_prev * (1 - a * k) / b
    return gain


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 100])
def test_ddim_has_the_gain_of_the_exact_chain(
    objective: Objective, spacing: Spacing, num_steps: int
) -> None:
    diffusion = Diffusion(SCHEDULE, objective)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x = sample_ddim(
        diffusion,
        gaussian_denoiser(diffusion),
        x_T,
        num_steps=num_steps,
        spacing=spacing,
        clip_x_start=False,
    )
    assert torch.allclose(x, closed_form_gain(num_steps, spacing) * x_T, rtol=0, atol=1e-10)


def test_ancestral_sampling_reaches_the_variance_of_its_chain() -> None:
    # eta = 1: variance follows v <- g^2 v + sigma^2 with the step's own gain g.
    diffusion = Diffusion(SCHEDULE, "pred_noise")
    x_T = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample_ddim(
        diffusion,
        gaussian_denoiser(diffusion),
        x_T,
        num_steps=100,
        eta=1.0,
        clip_x_start=False,
        generator=torch.Generator().manual_seed(1),
    )
    variance = 1.0
    steps = [*range(99, -1, -1), -1]
    for t, t_prev in pairwise(steps):
        a, b = scales_at(SCHEDULE, t)
        a_prev, b_prev = scales_at(SCHEDULE, t_prev)
        k = a * DATA_STD**2 / (a**2 * DATA_STD**2 + b**2)
        alpha = a / a_prev
        sigma_2 = (b**2 - alpha**2 * b_prev**2) * b_prev**2 / b**2
        gain = a_prev * k + max(b_prev**2 - sigma_2, 0) ** 0.5 * (1 - a * k) / b
        variance = gain**2 * variance + sigma_2
    assert float(x.var()) == pytest.approx(variance, rel=0.05)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    together, _ = make_image_noise((1, 4, 4), range(8))
    alone, _ = make_image_noise((1, 4, 4), [5])
    assert torch.equal(together[5:6], alone)

    diffusion = Diffusion(SCHEDULE, "pred_v")
    samples = {}
    for name, seeds in (("together", range(8)), ("alone", [5])):
        noise, generators = make_image_noise((1, 4, 4), seeds)
        samples[name] = sample_ddim(
            diffusion, lambda x, _: x.sin(), noise, num_steps=10, eta=0.5, generator=generators
        )
    assert torch.allclose(samples["together"][5:6], samples["alone"], atol=1e-5)


def test_reports_every_step() -> None:
    seen = []
    sample_ddim(
        Diffusion(SCHEDULE),
        lambda x, _: torch.zeros_like(x),
        torch.zeros(1, 1, 2, 2),
        num_steps=5,
        on_step=lambda k, x: seen.append((k, x.shape)),
    )
    assert seen == [(k, (1, 1, 2, 2)) for k in range(1, 6)]


@pytest.mark.parametrize(
    ("eta", "message"), [(1.5, "eta must be between 0 and 1"), (0.5, "needs a generator")]
)
def test_refuses_eta_it_cannot_honour(eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_ddim(Diffusion(SCHEDULE), lambda x, _: x, torch.zeros(1, 1), num_steps=3, eta=eta)
