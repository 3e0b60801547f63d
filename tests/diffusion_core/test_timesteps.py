from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core import draw_timesteps, make_timesteps
from diffusion_core.timesteps import DRAWS, SPACINGS, Draw, Spacing


@given(
    num_train_timesteps=st.integers(1, 1200),
    share=st.floats(0, 1),
    spacing=st.sampled_from(SPACINGS),
)
def test_descends_within_range_with_the_right_length(
    num_train_timesteps: int, share: float, spacing: Spacing
) -> None:
    num_steps = max(1, round(share * num_train_timesteps))
    steps = make_timesteps(num_train_timesteps, num_steps, spacing).tolist()
    assert len(steps) == num_steps
    assert steps == sorted(set(steps), reverse=True)
    assert steps[-1] >= 0
    assert steps[0] <= num_train_timesteps - 1


@given(num_train_timesteps=st.integers(2, 400), num_steps=st.integers(2, 400))
def test_rounds_half_to_even_as_exact_fractions_do(
    num_train_timesteps: int, num_steps: int
) -> None:
    num_steps = min(num_steps, num_train_timesteps)
    T, n = num_train_timesteps, num_steps
    trailing = [round(Fraction(T * (n - k), n)) - 1 for k in range(n)]
    linspace = [round(Fraction((T - 1) * k, n - 1)) for k in reversed(range(n))]
    assert make_timesteps(T, n, "trailing").tolist() == trailing
    assert make_timesteps(T, n, "linspace").tolist() == linspace


def test_known_lists() -> None:
    assert make_timesteps(1000, 4, "leading").tolist() == [750, 500, 250, 0]
    assert make_timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert make_timesteps(1000, 4, "linspace").tolist() == [999, 666, 333, 0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_is_the_noisiest(spacing: Spacing) -> None:
    assert make_timesteps(7, 1, spacing).tolist() == [6]


@pytest.mark.parametrize("num_steps", [0, 11])
def test_refuses_what_it_cannot_visit(num_steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and num_train_timesteps = 10"):
        make_timesteps(10, num_steps)


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_an_unknown_spacing() -> None:
    with pytest.raises(ValueError, match="spacing must be one of"):
        make_timesteps(10, 2, "even")  # pyright: ignore


@pytest.mark.parametrize("draw", DRAWS)
def test_each_draw_is_uniform_on_its_own(draw: Draw) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_timesteps(10, 8, draw, generator) for _ in range(4000)])
    for column in (0, 3, 7):
        counts = torch.bincount(drawn[:, column], minlength=10)
        assert counts.shape == (10,)
        assert float((counts - 400).abs().max()) < 100  # 5 deviations of a binomial


def test_antithetic_pairs_and_strata() -> None:
    pairs = draw_timesteps(100, 7, "antithetic", torch.Generator().manual_seed(0))
    assert (pairs[:3] + pairs[4:]).tolist() == [99] * 3
    strata = draw_timesteps(100, 10, "stratified", torch.Generator().manual_seed(0))
    assert sorted(t // 10 for t in strata.tolist()) == list(range(10))


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_an_unknown_draw() -> None:
    with pytest.raises(ValueError, match="draw must be one of"):
        draw_timesteps(10, 2, "sobol")  # pyright: ignore
