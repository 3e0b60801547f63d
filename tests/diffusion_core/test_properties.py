"""What holds for every schedule, objective, timestep and batch, by hypothesis."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core import Diffusion, NoiseSchedule, make_schedule
from diffusion_core.objectives import OBJECTIVES, Objective
from diffusion_core.posterior import posterior, scales_at

NAMES = st.sampled_from(["cosine", "sigmoid", "scaled_linear", "logistic", "lerp", "sqrt"])
LENGTHS = st.integers(2, 200)
SCALES = st.floats(0.1, 2)


def make(name: str, num_train_timesteps: int, scale: float) -> NoiseSchedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some never reach noise
        schedule = make_schedule(name, num_train_timesteps)
        return schedule.input_scaled(scale) if schedule.is_variance_preserving else schedule


def valid(schedule: NoiseSchedule, objective: Objective) -> Objective:
    """The objective, or pred_v where the schedule gives it no meaning."""
    is_refused = (objective == "pred_flow" and schedule.name != "lerp") or (
        objective == "pred_noise" and schedule.has_zero_terminal_snr
    )
    return "pred_v" if is_refused else objective


@settings(max_examples=60)
@given(NAMES, LENGTHS, SCALES, st.sampled_from(OBJECTIVES), st.integers(0, 2**31))
def test_conversions_round_trip(
    name: str, T: int, scale: float, objective: Objective, seed: int
) -> None:
    schedule = make(name, T, scale)
    diffusion = Diffusion(schedule, valid(schedule, objective))
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(T, (3,), generator=g)
    x_start, noise = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    x_t = diffusion.q_sample(x_start, t, noise)
    found = diffusion.convert(diffusion.target(x_start, t, noise), x_t, t)
    a, b = schedule.signal_scale[t][:, None], schedule.noise_scale[t][:, None]
    # What is divided by a small scale loses as many digits.
    assert torch.allclose(found.pred_x_start * a, x_start * a, atol=1e-9)
    assert torch.allclose(found.pred_noise * b, noise * b, atol=1e-9)


@settings(max_examples=60)
@given(NAMES, LENGTHS, SCALES, st.integers(0, 2**31))
def test_the_posterior_leads_where_the_forward_process_was(
    name: str, T: int, scale: float, seed: int
) -> None:
    # Averaged over q(x_t | x_start), q(x_p | x_t, x_start) is q(x_p | x_start).
    schedule = make(name, T, scale)
    t = 1 + seed % (T - 1)
    p = seed // T % t
    q = posterior(schedule, t, p)
    (a, b), (a_p, b_p) = scales_at(schedule, t), scales_at(schedule, p)
    assert q.on_x_t * a + q.on_x_start == pytest.approx(a_p, rel=1e-9)
    assert (q.on_x_t * b) ** 2 + q.variance == pytest.approx(b_p**2, rel=1e-9)
    assert 0 < q.variance < q.beta * (1 + 1e-12)


@settings(max_examples=30)
@given(NAMES, LENGTHS, st.sampled_from(OBJECTIVES), st.integers(1, 7), st.integers(0, 2**31))
def test_splitting_a_batch_leaves_the_mean_loss(
    name: str, T: int, objective: Objective, cut: int, seed: int
) -> None:
    schedule = make(name, T, 1.0)
    diffusion = Diffusion(schedule, valid(schedule, objective))
    g = torch.Generator().manual_seed(seed)
    x_start, noise = torch.randn(2, 8, 1, 3, generator=g, dtype=torch.float64)
    t = torch.randint(T, (8,), generator=g)

    def loss(rows: slice) -> float:
        return float(
            diffusion.loss(lambda x, _: x.sin(), x_start[rows], t=t[rows], noise=noise[rows])
        )

    parts = (cut * loss(slice(0, cut)) + (8 - cut) * loss(slice(cut, 8))) / 8
    assert parts == pytest.approx(loss(slice(None)), rel=1e-5)
