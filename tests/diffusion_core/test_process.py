import pytest
import torch
from torch import Tensor

from diffusion_core import Diffusion, NoiseSchedule, make_schedule
from diffusion_core.objectives import WEIGHTINGS, Objective, Weighting, loss_weights
from diffusion_core.posterior import posterior, scales_at

SCHEDULE = make_schedule("cosine", 20)
LERP = make_schedule("lerp", 20)
VALID: list[tuple[NoiseSchedule, Objective]] = [
    (SCHEDULE, "pred_noise"),
    (SCHEDULE, "pred_x0"),
    (SCHEDULE, "pred_v"),
    (LERP, "pred_x0"),
    (LERP, "pred_v"),
    (LERP, "pred_flow"),
]


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_start, noise and timesteps in float64."""
    g = torch.Generator().manual_seed(seed)
    x_start = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    return x_start, noise, torch.randint(20, (shape[0],), generator=g)


@pytest.mark.parametrize(("schedule", "objective"), VALID)
@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 2, 8), (6, 2)])
def test_conversion_inverts_the_target(
    schedule: NoiseSchedule, objective: Objective, shape: tuple[int, ...]
) -> None:
    diffusion = Diffusion(schedule, objective)
    x_start, noise, t = draw(shape)
    x_t = diffusion.q_sample(x_start, t, noise)
    prediction = diffusion.convert(diffusion.target(x_start, t, noise), x_t, t)
    assert torch.allclose(prediction.pred_x_start, x_start, atol=1e-9)
    assert torch.allclose(prediction.pred_noise, noise, atol=1e-9)


@pytest.mark.parametrize(("schedule", "objective"), VALID)
def test_clipped_prediction_still_explains_x_t(
    schedule: NoiseSchedule, objective: Objective
) -> None:
    diffusion = Diffusion(schedule, objective)
    x_start, noise, t = draw((6, 3, 4, 4))
    x_t = diffusion.q_sample(x_start, t, noise)
    prediction = diffusion.predict(lambda x, _: x * 3, x_t, t, clip_x_start=True)
    assert float(prediction.pred_x_start.abs().max()) <= 1
    again = diffusion.q_sample(prediction.pred_x_start, t, prediction.pred_noise)
    assert torch.allclose(again, x_t, atol=1e-12)


@pytest.mark.filterwarnings("ignore:weighting 'snr' gives weight 0")
@pytest.mark.parametrize(("schedule", "objective"), VALID)
def test_snr_weighting_makes_every_loss_the_noise_loss(
    schedule: NoiseSchedule, objective: Objective
) -> None:
    x_start, noise, t = draw((6, 3, 4, 4))
    guess = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)).double()
    reference = ((guess - noise) ** 2).flatten(1).mean(1)

    t = t.clamp(max=18)  # lerp's last step holds no signal
    diffusion = Diffusion(schedule, objective, "snr")
    x_t = diffusion.q_sample(x_start, t, noise)
    a, b = (scale[t].view(-1, 1, 1, 1) for scale in (schedule.signal_scale, schedule.noise_scale))
    implied_x_start = (x_t - b * guess) / a
    output = diffusion.target(implied_x_start, t, guess)
    loss = diffusion.loss_per_sample(lambda *_: output, x_start, t=t, noise=noise)
    assert torch.allclose(loss.double(), reference, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:weighting '(min_)?snr' gives weight 0")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v", "pred_flow"])
@pytest.mark.parametrize("num_train_timesteps", [1, 2, 1000])
def test_weights_are_finite(
    objective: Objective, weighting: Weighting, num_train_timesteps: int
) -> None:
    name = "lerp" if objective == "pred_flow" else "cosine"
    weights = loss_weights(make_schedule(name, num_train_timesteps), objective, weighting)
    assert bool((torch.isfinite(weights) & (weights >= 0)).all())
    assert bool((weights[:-1] > 0).all())


def test_vlb_weight_is_the_kl_between_posteriors() -> None:
    # KL of two Gaussians of equal variance whose means differ by the x_start coefficient.
    weights = loss_weights(SCHEDULE, "pred_x0", "vlb")
    for t in range(1, 20):
        q = posterior(SCHEDULE, t, t - 1)
        assert float(weights[t]) == pytest.approx(q.on_x_start**2 / (2 * q.variance), rel=1e-9)
    assert float(weights[0]) == pytest.approx(1 / (2 * posterior(SCHEDULE, 1, 0).variance))


def test_min_snr_equals_the_papers_form() -> None:
    snr = SCHEDULE.snr
    capped = snr.clamp(max=5.0)
    for objective, expected in (
        ("pred_noise", capped / snr),
        ("pred_x0", capped),
        ("pred_v", capped / (snr + 1)),
    ):
        got = loss_weights(SCHEDULE, objective, "min_snr")  # pyright: ignore
        assert torch.allclose(got, expected, rtol=1e-12)


def test_weight_0_where_sampling_starts_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="Use uniform"):
        Diffusion(SCHEDULE.zero_terminal_snr(), "pred_v", "min_snr")


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
    assert posterior(SCHEDULE, t, t - 1).variance == pytest.approx(float(expected), rel=1e-9)


def test_data_is_timestep_minus_one() -> None:
    assert scales_at(SCHEDULE, -1) == (1.0, 0.0)
    assert posterior(SCHEDULE, 3, -1).variance == 0


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_objective_and_weighting_are_refused() -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        Diffusion(SCHEDULE, "pred_score")  # pyright: ignore
    with pytest.raises(ValueError, match="weighting must be one of"):
        Diffusion(SCHEDULE, "pred_v", "snr_min")  # pyright: ignore
    with pytest.raises(ValueError, match="gamma must be above 0"):
        Diffusion(SCHEDULE, "pred_v", "min_snr", gamma=0)


def test_vlb_weight_of_a_single_step_is_by_its_own_noise() -> None:
    schedule = make_schedule("cosine", 1)
    weights = loss_weights(schedule, "pred_x0", "vlb")
    assert weights.tolist() == pytest.approx([1 / (2 * posterior(schedule, 0, -1).beta)])
