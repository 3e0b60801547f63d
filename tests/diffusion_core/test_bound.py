import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_core import Diffusion, make_schedule, variational_bound
from diffusion_core.posterior import decoder_bits, posterior, scales_at
from diffusion_core.process import Denoiser
from diffusion_core.samplers import Variance

BINS = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1


def shrink(x_t: Tensor, t: Tensor) -> Tensor:
    """Some network: its word on x_start."""
    return 0.5 * x_t


def shrink_and_vary(x_t: Tensor, t: Tensor) -> Tensor:
    """The same, with a log variance 0.7 of the way from the posterior's to beta's."""
    return torch.cat([0.5 * x_t, torch.full_like(x_t, 0.4)], dim=1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("name", ["cosine", "lerp"])
def test_equals_the_papers_sum_term_by_term(name: str, T: int, variance: Variance) -> None:
    schedule = make_schedule(name, T)
    x_start = BINS[[3, 200]][:, None]
    got = variational_bound(
        Diffusion(schedule, "pred_x0", learned_variance=variance == "learned"),
        shrink_and_vary if variance == "learned" else shrink,
        x_start, variance=variance, clip_x_start=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(2, 1, generator=generator, dtype=torch.float64) for _ in range(T)]
    for i, x in enumerate(x_start[:, 0].tolist()):
        a, b = scales_at(schedule, T - 1)
        prior = 0.5 * ((a * x) ** 2 + b**2 - 1 - math.log(b**2)) / math.log(2)
        kl = decoder = 0.0
        for t in range(T - 1, -1, -1):
            a, b = scales_at(schedule, t)
            x_t = a * x + b * float(noises[T - 1 - t][i])
            q = posterior(schedule, t, t - 1)
            if t > 0:
                mean_q = q.on_x_t * x_t + q.on_x_start * x
                mean_p = q.on_x_t * x_t + q.on_x_start * 0.5 * x_t
                vq = q.variance
                vp = {
                    "fixed_small": q.variance,
                    "fixed_large": q.beta,
                    "learned": q.variance**0.3 * q.beta**0.7,
                }[variance]
                normal = torch.distributions.Normal
                p, q_ = normal(mean_p, vp**0.5), normal(mean_q, vq**0.5)
                kl += float(torch.distributions.kl_divergence(q_, p)) / math.log(2)
            else:
                small = posterior(schedule, 1, 0).variance if T > 1 else q.beta
                std = {
                    "fixed_small": small,
                    "fixed_large": q.beta,
                    "learned": small**0.3 * q.beta**0.7,
                }[variance] ** 0.5
                low, high = ((x + s / 255 - 0.5 * x_t) / (std * 2**0.5) for s in (-1, 1))
                decoder = -math.log2(max(0.5 * (math.erf(high) - math.erf(low)), 1e-12))
        assert float(got.prior[i]) == pytest.approx(prior, abs=1e-6)
        assert float(got.kl[i]) == pytest.approx(kl, rel=1e-5, abs=1e-6)
        assert float(got.decoder[i]) == pytest.approx(decoder, rel=1e-5)
        assert float(got.total[i]) == pytest.approx(prior + kl + decoder, rel=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.9, 0.05), (-1.2, 0.5)])
def test_the_bins_share_the_whole_mass(mean: float, std: float) -> None:
    bits = decoder_bits(BINS[:, None], torch.full((256, 1), mean, dtype=torch.float64), std)
    assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-8)


def test_float32_has_the_tails_of_float64() -> None:
    x_start = BINS[[100, 120, 128]][:, None]
    mean = x_start + torch.tensor([[0.01], [0.02], [0.03]])
    exact = decoder_bits(x_start, mean, 0.0045)
    got = decoder_bits(x_start.float(), mean.float(), 0.0045)
    assert torch.allclose(got.double(), exact, rtol=1e-3)


def test_a_network_that_knows_the_data_needs_no_kl() -> None:
    x_start = BINS[[10, 128, 255]].repeat(4, 1).T.contiguous()
    bound = variational_bound(
        Diffusion(make_schedule("cosine", 50), "pred_x0"), lambda x, t: x_start, x_start
    )
    assert float(bound.kl.abs().max()) < 1e-9
    assert float(bound.prior.max()) < 1e-3


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_an_unknown_variance() -> None:
    diffusion, unknown = Diffusion(make_schedule("cosine", 2)), "x"
    with pytest.raises(ValueError, match="variance must be one of"):
        variational_bound(diffusion, shrink, BINS[:1, None], variance=unknown)  # pyright: ignore


def test_refuses_a_variance_that_the_network_does_not_have() -> None:
    diffusion = Diffusion(make_schedule("cosine", 2))
    with pytest.raises(ValueError, match="'learned' needs a network that puts it out"):
        variational_bound(diffusion, shrink, BINS[:1, None], variance="learned")


def bound_of(model: Denoiser, **options: Any) -> Tensor:
    diffusion = Diffusion(make_schedule("cosine", 5), "pred_x0", null_label=3)
    generator = torch.Generator().manual_seed(0)
    return variational_bound(
        diffusion, model, BINS[[3, 200]][:, None], generator=generator, **options
    ).total


def test_the_network_is_told_the_labels() -> None:
    labels = torch.tensor([0, 2])

    def told(x_t: Tensor, t: Tensor, guess: None, class_labels: Tensor) -> Tensor:
        return 0.5 * x_t + 0.1 * class_labels[:, None]

    def knows(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x_t + 0.1 * labels[:, None]

    assert torch.equal(bound_of(told, class_labels=labels), bound_of(knows))


def test_the_guess_of_the_data_is_clamped_when_that_is_asked_for() -> None:
    beyond, within = (lambda x_t, t, v=v: torch.full_like(x_t, v) for v in (3.0, 1.0))
    clamped = bound_of(within, clip_x_start=False)
    assert torch.equal(bound_of(beyond), clamped)
    assert bool((bound_of(beyond, clip_x_start=False) > clamped).all())
