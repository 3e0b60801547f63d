import pytest
import torch
from torch import Tensor

from diffusion_core import Diffusion, make_schedule
from diffusion_core.objectives import OBJECTIVES, WEIGHTINGS, Objective, Weighting, loss_weights
from diffusion_core.process import posterior_variance, scales_at

SCHEDULE = make_schedule("cosine", 20)


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_start, noise and timesteps in float64."""
    g = torch.Generator().manual_seed(seed)
    x_start = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    return x_start, noise, torch.randint(20, (shape[0],), generator=g)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 2, 8), (6, 2)])
def test_conversion_inverts_the_target(objective: Objective, shape: tuple[int, ...]) -> None:
    diffusion = Diffusion(SCHEDULE, objective)
    x_start, noise, t = draw(shape)
    x_t = diffusion.q_sample(x_start, t, noise)
    prediction = diffusion.convert(diffusion.target(x_start, t, noise), x_t, t)
    assert torch.allclose(prediction.pred_x_start, x_start, atol=1e-9)
    assert torch.allclose(prediction.pred_noise, noise, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_clipped_prediction_still_explains_x_t(objective: Objective) -> None:
    diffusion = Diffusion(SCHEDULE, objective)
    x_start, noise, t = draw((6, 3, 4, 4))
    x_t = diffusion.q_sample(x_start, t, noise)
    prediction = diffusion.predict(lambda x, _: x * 3, x_t, t, clip_x_start=True)
    assert float(prediction.pred_x_start.abs().max()) <= 1
    again = diffusion.q_sample(prediction.pred_x_start, t, prediction.pred_noise)
    assert torch.allclose(again, x_t, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_snr_weighting_makes_every_loss_the_noise_loss(objective: Objective) -> None:
    x_start, noise, t = draw((6, 3, 4, 4))
    guess = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)).double()
    reference = ((guess - noise) ** 2).flatten(1).mean(1)

    diffusion = Diffusion(SCHEDULE, objective, "snr")
    x_t = diffusion.q_sample(x_start, t, noise)
    a, b = (scale[t].view(-1, 1, 1, 1) for scale in (SCHEDULE.signal_scale, SCHEDULE.noise_scale))
    implied_x_start = (x_t - b * guess) / a
    output = diffusion.target(implied_x_start, t, guess)
    loss = diffusion.loss_per_sample(lambda *_: output, x_start, t=t, noise=noise)
    assert torch.allclose(loss.double(), reference, rtol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_are_finite_and_positive(objective: Objective, weighting: Weighting) -> None:
    weights = loss_weights(make_schedule("cosine", 1000), objective, weighting)
    assert bool((torch.isfinite(weights) & (weights > 0)).all())


def test_loss_gradient_equals_a_hand_written_one() -> None:
    # model(x_t) = k x_t with pred_noise: dL/dk = mean(2 (k x_t - noise) x_t).
    diffusion = Diffusion(SCHEDULE, "pred_noise")
    x_start, noise, t = draw((6, 1, 4, 4))
    k = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    diffusion.loss(lambda x, _: k * x, x_start, t=t, noise=noise).backward()
    x_t = diffusion.q_sample(x_start, t, noise)
    expected = (2 * (0.3 * x_t - noise) * x_t).mean()
    assert float(k.grad) == pytest.approx(float(expected), rel=1e-5)  # pyright: ignore


def test_splitting_a_batch_leaves_the_mean_loss() -> None:
    diffusion = Diffusion(SCHEDULE, "pred_v", "min_snr")
    x_start, noise, t = draw((8, 1, 4, 4))

    def loss(rows: slice) -> float:
        return float(
            diffusion.loss(lambda x, _: x, x_start[rows], t=t[rows], noise=noise[rows]).double()
        )

    whole = loss(slice(None))
    assert (loss(slice(0, 4)) + loss(slice(4, 8))) / 2 == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("t", [1, 7, 19])
def test_posterior_variance_is_ddpm_equation_7(t: int) -> None:
    abar, beta = SCHEDULE.alphas_cumprod, SCHEDULE.betas
    expected = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
    assert posterior_variance(SCHEDULE, t, t - 1) == pytest.approx(float(expected), rel=1e-9)


def test_data_is_timestep_minus_one() -> None:
    assert scales_at(SCHEDULE, -1) == (1.0, 0.0)
    assert posterior_variance(SCHEDULE, 3, -1) == 0


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_objective_and_weighting_are_refused() -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        Diffusion(SCHEDULE, "pred_score")  # pyright: ignore
    with pytest.raises(ValueError, match="weighting must be one of"):
        Diffusion(SCHEDULE, "pred_v", "snr_min")  # pyright: ignore
    with pytest.raises(ValueError, match="gamma must be above 0"):
        Diffusion(SCHEDULE, "pred_v", "min_snr", gamma=0)
