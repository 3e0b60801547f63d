import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core import make_schedule

NAMES = ("linear", "scaled_linear", "cosine", "sigmoid")


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
    with pytest.raises(ValueError, match="must be one of linear, scaled_linear, cosine, sigmoid"):
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
