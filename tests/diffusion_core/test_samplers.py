"""Samplers beyond the chains of `test_conformance.py`: seeds, steps, extremes, refusals."""

import pytest
import torch
from torch import Tensor

from diffusion_core import (
    Diffusion,
    interpolate,
    make_image_noise,
    make_schedule,
    make_timesteps,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
)

SCHEDULE = make_schedule("cosine", 100)


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


@pytest.mark.parametrize("count", [1, 2])
def test_refuses_another_number_of_generators_than_images(count: int) -> None:
    _, generators = make_image_noise((1, 2, 2), range(count))
    with pytest.raises(ValueError, match="one for each of the 3 images"):
        sample_ddim(
            Diffusion(SCHEDULE), zeros, torch.zeros(3, 1, 2, 2), num_steps=2, eta=1.0,
            generator=generators,
        )  # fmt: skip


def test_samples_can_be_learned_from() -> None:
    x = sample_ddim(Diffusion(SCHEDULE), zeros, torch.randn(2, 1, 2, 2), num_steps=2)
    weight = torch.ones((), requires_grad=True)
    (weight * x).square().sum().backward()
    assert weight.grad is not None


def zeros(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_timesteps_take_the_place_of_num_steps() -> None:
    x_T, diffusion = torch.randn(2, 1, 4, 4), Diffusion(SCHEDULE)
    steps = make_timesteps(100, 7, "linspace").tolist()
    by_number = sample_ddim(diffusion, zeros, x_T, num_steps=7, spacing="linspace")
    assert torch.equal(sample_ddim(diffusion, zeros, x_T, timesteps=steps), by_number)


@pytest.mark.parametrize("steps", [[], [3, 5], [5, 5], [100], [3, -1]])
def test_refuses_timesteps_that_do_not_descend(steps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must descend strictly within 99\.\.0"):
        sample_dpmpp_2m(Diffusion(SCHEDULE), zeros, torch.zeros(1, 1), timesteps=steps)


def test_refuses_both_or_neither_of_num_steps_and_timesteps() -> None:
    for arguments in ({}, {"num_steps": 2, "timesteps": [1, 0]}):
        with pytest.raises(ValueError, match="either num_steps or timesteps"):
            sample_ddpm(Diffusion(SCHEDULE), zeros, torch.zeros(1, 1), **arguments)


def test_ancestral_sampling_needs_a_generator() -> None:
    with pytest.raises(ValueError, match="needs a generator"):
        sample_ddpm(Diffusion(SCHEDULE), zeros, torch.zeros(1, 1), num_steps=2)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_ddpm, sample_dpmpp_2m])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_starts_from_noise_alone_without_dividing_by_it(sampler, steps: int) -> None:
    diffusion = Diffusion(SCHEDULE.zero_terminal_snr(), "pred_v")
    more = {"generator": torch.Generator()} if sampler is sample_ddpm else {}
    x = sampler(diffusion, zeros, torch.randn(2, 1, 4, 4), num_steps=steps, **more)
    assert bool(torch.isfinite(x).all())
    assert float(x.abs().max()) <= 1


def test_interpolation_of_each_in_a_batch_is_that_of_one() -> None:
    diffusion = Diffusion(SCHEDULE, "pred_x0")
    x_1, x_2, noise = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64).clamp(-1, 1)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)

    def go(at: slice, weight: float | torch.Tensor) -> torch.Tensor:
        return interpolate(
            diffusion, lambda x, t: x.tanh(), x_1[at], x_2[at], t=60, weight=weight,
            noise=noise[at], num_steps=7,
        )  # fmt: skip

    together = go(slice(None), weights)
    apart = [go(slice(0, 1), 0.25), go(slice(1, 2), 0.75)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-12)
    with pytest.raises(ValueError, match=r"num_steps must be within 1\.\.4 for t = 3, got 5"):
        interpolate(
            diffusion, zeros, x_1, x_2, t=3, weight=0.5, noise=noise, num_steps=5
        )  # fmt: skip


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_interpolation_ends_at_its_images(weight: float) -> None:
    # One image is all the data there is: the ideal network knows it.
    diffusion = Diffusion(SCHEDULE, "pred_x0")
    images = torch.rand(2, 1, 1, 4, 4, dtype=torch.float64) * 2 - 1
    chosen = images[int(weight)]
    x = interpolate(
        diffusion, lambda x, t: chosen, images[0], images[1], t=60, weight=weight,
        noise=torch.randn(1, 1, 4, 4, dtype=torch.float64),
    )  # fmt: skip
    assert torch.allclose(x, chosen, atol=1e-9)
    with pytest.raises(ValueError, match=r"t must be within 0\.\.99, got 100"):
        interpolate(
            diffusion, zeros, images[0], images[1], t=100, weight=0.5,
            noise=torch.zeros_like(chosen),
        )  # fmt: skip
    with pytest.raises(ValueError, match="weight must be between 0 and 1"):
        interpolate(
            diffusion, zeros, images[0], images[1], t=6, weight=2.0, noise=torch.zeros_like(chosen)
        )


def test_interpolation_denoises_as_the_sampler_does_that_is_told_the_same() -> None:
    diffusion = Diffusion(SCHEDULE, "pred_x0", null_label=3)
    x_1, x_2, noise = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)

    def model(x: Tensor, t: Tensor, guess: None, class_labels: Tensor) -> Tensor:
        return 2 * x + 0.3 * class_labels.view(-1, 1, 1, 1)

    told = {"class_labels": torch.tensor([0, 2]), "guidance_scale": 3.0, "clip_x_start": False}
    x = interpolate(
        diffusion, model, x_1, x_2, t=60, weight=0.25, noise=noise, num_steps=3, **told
    )  # fmt: skip
    t = torch.full((2,), 60)
    x_t = torch.lerp(diffusion.q_sample(x_1, t, noise), diffusion.q_sample(x_2, t, noise), 0.25)
    expected = sample_ddim(diffusion, model, x_t, timesteps=[60, 30, 0], **told)
    assert torch.allclose(x, expected, atol=1e-9)
