import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core import NoiseSchedule, make_schedule

NAMES = ("linear", "cosine", "sigmoid", "sqrt")  # those that reach noise by default


@pytest.mark.parametrize("name", NAMES)
def test_is_a_variance_preserving_schedule_in_float64(name: str) -> None:
    schedule = make_schedule(name, 1000)
    assert schedule.signal_scale.dtype == torch.float64
    assert torch.allclose(
        schedule.signal_scale**2 + schedule.noise_scale**2, torch.ones(1000).double()
    )
    assert bool((schedule.snr.diff() < 0).all())
    assert bool(((schedule.betas > 0) & (schedule.betas < 1)).all())


@given(
    num_train_timesteps=st.integers(30, 400),
    beta_start=st.floats(1e-5, 5e-4),
    ratio=st.floats(1.5, 300),
)
def test_linear_signal_falls_strictly(
    num_train_timesteps: int, beta_start: float, ratio: float
) -> None:
    beta_end = min(beta_start * ratio, 0.025)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these never reach noise, and say so
        schedule = make_schedule(
            "linear", num_train_timesteps, beta_start=beta_start, beta_end=beta_end
        )
    assert bool((schedule.alphas_cumprod.diff() < 0).all())


def test_cosine_equals_equation_17() -> None:
    # Nichol & Dhariwal (2102.09672) eq. 17, term by term in Python floats.
    T, s = 50, 0.008

    def f(i: int) -> float:
        return math.cos((i / T + s) / (1 + s) * math.pi / 2) ** 2

    expected, product = [], 1.0
    for i in range(T):
        product *= 1 - min(1 - f(i + 1) / f(i), 0.999)
        expected.append(product)
    got = make_schedule("cosine", T, s=s).alphas_cumprod
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_sigmoid_equals_algorithm_1() -> None:
    # Jabri et al. (2212.11972) Algorithm 1 in Python floats; a ratio of 1 at u = 0.
    T, start, end, tau = 40, -3.0, 3.0, 0.9

    def sig(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def abar(u: float) -> float:
        high, low = sig(end / tau), sig(start / tau)
        return (high - sig((u * (end - start) + start) / tau)) / (high - low)

    expected, product = [], 1.0
    for i in range(T):
        product *= 1 - min(1 - abar((i + 1) / T) / abar(i / T), 0.999)
        expected.append(product)
    got = make_schedule("sigmoid", T, start=start, end=end, tau=tau).alphas_cumprod
    assert got.tolist() == pytest.approx(expected, rel=1e-9)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="must be one of linear, scaled_linear, cosine, sigmoid, sqrt, logistic"
    ):
        make_schedule("cosin", 10)


def test_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="does not take these options: beta"):
        make_schedule("cosine", 10, beta=1.0)


@pytest.mark.parametrize("tau", [0.0, 0.001])
def test_options_that_cannot_be_computed_are_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=f"cannot be computed with tau={tau}"):
        make_schedule("sigmoid", 10, tau=tau)


def test_betas_above_one_are_refused_with_the_index() -> None:
    with pytest.raises(
        ValueError, match=r"beta\[5\] = 1.116, and every beta must lie between 0 and 1"
    ):
        make_schedule("linear", 10)


def test_warns_when_it_never_reaches_noise() -> None:
    with pytest.warns(UserWarning, match="keeps abar = 0.77"):
        make_schedule("linear", 100, beta_start=1e-5, beta_end=5e-3, scale_to_T=False)


def test_sqrt_is_in_abar_and_refuses_an_s_that_ends_early() -> None:
    # Diffusion-LM: abar(u) = 1 - sqrt(u + s), a ratio of 1 at u = 0; the last beta is capped.
    T, s = 100, 1e-4
    abar = make_schedule("sqrt", T, s=s).alphas_cumprod
    expected = [(1 - math.sqrt((i + 1) / T + s)) / (1 - math.sqrt(s)) for i in range(T - 1)]
    assert abar[:-1].tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"needs 0 < s < 1/T = 0\.01"):
        make_schedule("sqrt", T, s=0.01)


def test_logistic_is_the_s_curve_demos() -> None:
    with pytest.warns(UserWarning, match="keeps abar = 0.778"):
        betas = make_schedule("logistic", 100).betas
    expected = [(5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 99)) + 1e-5 for i in range(100)]
    assert betas.tolist() == pytest.approx(expected, rel=1e-9)


def test_lerp_is_the_straight_path() -> None:
    schedule = make_schedule("lerp", 4)
    assert schedule.signal_scale.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert schedule.noise_scale.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert not schedule.is_variance_preserving
    with pytest.raises(ValueError, match="is defined for variance-preserving schedules only"):
        _ = schedule.betas


def test_trained_betas_are_taken_as_they_are() -> None:
    betas = [0.1, 0.2, 0.999]
    assert make_schedule("trained_betas", 3, betas=betas).betas.tolist() == pytest.approx(betas)
    assert make_schedule("trained_betas", 2, betas=[0.5, 1.0]).has_zero_terminal_snr
    for wrong in ([0.1, 1.0, 0.2], [0.1, -0.1, 0.2], [0.1, math.nan, 0.2], [0.1, 0.2]):
        with pytest.raises(ValueError, match="beta"):
            make_schedule("trained_betas", 3, betas=wrong)


def test_zero_terminal_snr_is_algorithm_1() -> None:
    before = make_schedule("linear", 1000)
    after = before.zero_terminal_snr()
    a = [math.sqrt(v) for v in before.alphas_cumprod.tolist()]
    expected = [(v - a[-1]) * a[0] / (a[0] - a[-1]) for v in a]
    assert after.signal_scale.tolist() == pytest.approx(expected, abs=1e-12)
    assert float(after.signal_scale[-1]) == 0
    assert float(after.betas[-1]) == 1
    assert torch.isfinite(after.snr).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_shift_and_scale_move_log_snr(name: str) -> None:
    before = make_schedule(name, 100)
    shifted = before.shifted(base_resolution=32, resolution=128)
    moved = shifted.snr.log() - before.snr.log()
    assert torch.allclose(moved, torch.full_like(moved, 2 * math.log(32 / 128)), atol=1e-9)
    scaled = before.input_scaled(0.7)
    moved = scaled.snr.log() - before.snr.log()
    assert torch.allclose(moved, torch.full_like(moved, 2 * math.log(0.7)), atol=1e-9)
    assert scaled.is_variance_preserving


def test_modifiers_refuse_what_has_no_meaning() -> None:
    lerp, cosine = make_schedule("lerp", 10), make_schedule("cosine", 10)
    for refused in (lerp.zero_terminal_snr, lambda: lerp.input_scaled(0.5)):
        with pytest.raises(ValueError, match="variance-preserving schedules only"):
            refused()
    with pytest.raises(ValueError, match="must be above 0"):
        cosine.input_scaled(0.0)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        cosine.shifted(base_resolution=0, resolution=8)


@pytest.mark.parametrize(
    ("signal", "noise", "message"),
    [
        ([0.9, math.nan], [0.1, 0.2], "not finite"),
        ([0.9, 0.9], [0.1, 0.2], "signal that does not fall at step 1"),
        ([0.9, 0.8], [0.2, 0.1], "SNR that does not fall at step 1"),
        ([0.9, 0.8], [0.0, 0.1], "noise at every step"),
        ([1.0, 0.8], [0.1, 0.2], "noise at every step"),
    ],
)
def test_sequences_that_are_no_schedule_are_refused(
    signal: list[float], noise: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule("x", torch.tensor(signal).double(), torch.tensor(noise).double())


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("num_train_timesteps", [0, -3, 10.5])
def test_refuses_a_number_of_timesteps_that_is_none(num_train_timesteps: int) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 1 on"):
        make_schedule("cosine", num_train_timesteps)
