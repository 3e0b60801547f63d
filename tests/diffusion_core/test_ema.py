"""Averages against their closed forms, and widths made after training."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffusion_core import EMA, PostHocEMA, reconstruct
from diffusion_core.ema import Profile, mixing_weights, width_to_exponent


def weights_at(step: int) -> float:
    """What the only weight is after each optimiser step: no polynomial, so that order shows."""
    return math.sin(0.1 * step) + 0.01 * step


def follow(average: EMA | PostHocEMA, num_steps: int, first_step: int = 1) -> None:
    model = nn.Linear(1, 1, bias=False)
    for step in range(first_step, num_steps + 1):
        nn.init.constant_(model.weight, weights_at(step))
        average.update(model)


def only_weight(average: EMA) -> float:
    return float(next(average.model.parameters()).double())


@pytest.mark.parametrize(
    ("profile", "decays"),
    [
        ("constant", lambda s: 0.9),
        ("warmup", lambda s: min(0.9, 1 - (1 + s / 2) ** -0.75)),
        ("power", lambda s: (1 - 1 / s) ** (width_to_exponent(0.1) + 1)),
    ],
)
def test_equals_its_closed_form(profile: Profile, decays) -> None:
    model = nn.Linear(1, 1, bias=False)
    expected = float(model.weight.detach())
    ema = EMA(model, 0.9, profile=profile, inv_gamma=2.0, power=0.75, width=0.1)
    follow(ema, 200)
    for s in range(1, 201):
        expected = decays(s) * expected + (1 - decays(s)) * weights_at(s)
    assert only_weight(ema) == pytest.approx(expected, rel=1e-5)
    assert ema.num_updates == 200


def test_constant_profile_is_a_geometric_sum() -> None:
    ema = EMA(nn.Linear(1, 1, bias=False), 0.9, profile="constant")
    start = only_weight(ema)
    follow(ema, 50)
    expected = 0.9**50 * start + sum(0.1 * 0.9 ** (50 - s) * weights_at(s) for s in range(1, 51))
    assert only_weight(ema) == pytest.approx(expected, rel=1e-5)


def test_power_profile_weighs_the_past_by_its_power() -> None:
    # Unrolled, the recursion is close to the integral of (g + 1) s^g / t^(g + 1).
    ema = EMA(nn.Linear(1, 1, bias=False), profile="power", width=0.1)
    follow(ema, 500)
    g = width_to_exponent(0.1)
    integral = sum((s / 500) ** (g + 1) - ((s - 1) / 500) ** (g + 1) for s in range(1, 501))
    assert integral == pytest.approx(1)
    expected = sum(
        ((s / 500) ** (g + 1) - ((s - 1) / 500) ** (g + 1)) * weights_at(s) for s in range(1, 501)
    )
    assert only_weight(ema) == pytest.approx(expected, rel=1e-4)


def test_updates_every_so_many_steps() -> None:
    often, seldom = (EMA(nn.Linear(1, 1, bias=False), 0.5, profile="constant", update_every=n)
                     for n in (1, 10))  # fmt: skip
    start = only_weight(seldom)
    follow(seldom, 9)
    assert only_weight(seldom) == start
    follow(seldom, 10, first_step=10)
    assert only_weight(seldom) == pytest.approx(0.5 * start + 0.5 * weights_at(10), rel=1e-6)
    follow(often, 10)
    assert only_weight(often) != pytest.approx(only_weight(seldom))


def test_goes_on_from_saved_averages() -> None:
    whole, first = (EMA(nn.Linear(1, 1, bias=False), 0.99) for _ in range(2))
    second = EMA(nn.Linear(1, 1, bias=False), 0.99)
    first.model.load_state_dict(whole.model.state_dict())
    follow(whole, 40)
    follow(first, 25)
    second.load(first.model.state_dict(), first.num_updates)
    follow(second, 40, first_step=26)
    assert only_weight(second) == only_weight(whole)


def test_copies_buffers_and_leaves_the_model_alone() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model)
    with torch.no_grad():
        model.running_mean.fill_(3.0)  # pyright: ignore
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)  # pyright: ignore
    assert model.weight.requires_grad
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_exponent_has_the_width(width: float) -> None:
    g = width_to_exponent(width)
    # The standard deviation of the density (g + 1) s^g on 0..1, by its moments.
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_a_third_width_is_reconstructed(width: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    tracked, wanted = PostHocEMA(model), EMA(model, profile="power", width=width)
    snapshots = []
    for begin in range(0, 2000, 100):
        follow(tracked, begin + 100, first_step=begin + 1)
        snapshots += tracked.snapshots()
    follow(wanted, 2000)
    found = float(reconstruct(snapshots, width)["weight"])
    assert found == pytest.approx(only_weight(wanted), rel=0.01)
    # Neither of the tracked ones is as near.
    for average in tracked.averages:
        error = abs(only_weight(average) - only_weight(wanted))
        assert abs(found - only_weight(wanted)) < error / 3


def test_a_tracked_width_is_found_again() -> None:
    mixture = mixing_weights([(50, 0.05), (50, 0.1), (100, 0.05), (100, 0.1)], 100, 0.1)
    assert mixture == pytest.approx([0, 0, 0, 1], abs=1e-6)


def test_reconstructs_a_time_of_a_snapshot_and_refuses_others() -> None:
    model = nn.Linear(1, 1, bias=False)
    tracked, wanted = PostHocEMA(model), EMA(model, profile="power", width=0.07)
    snapshots = []
    for begin in range(0, 1000, 50):
        follow(tracked, begin + 50, first_step=begin + 1)
        snapshots += tracked.snapshots()
    follow(wanted, 500)
    early = [s for s in snapshots if s.num_updates <= 500]
    found = float(reconstruct(early, 0.07, num_updates=500)["weight"])
    assert found == pytest.approx(only_weight(wanted), rel=0.01)
    for given in (snapshots, early[:-2], []):
        with pytest.raises(ValueError, match=r"needs snapshots of updates 1\.\.500"):
            reconstruct(given, 0.07, num_updates=500)


def test_refuses_snapshots_of_before_training() -> None:
    with pytest.raises(ValueError, match="needs snapshots of updates"):
        reconstruct(PostHocEMA(nn.Linear(1, 1)).snapshots(), 0.07)


def test_reconstruction_keeps_counters_whole() -> None:
    model = nn.BatchNorm1d(2)
    tracked = PostHocEMA(model)
    tracked.update(model)
    counter = reconstruct(tracked.snapshots(), 0.07)["num_batches_tracked"]
    assert isinstance(counter, Tensor)
    assert counter.dtype == torch.int64


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_refuses_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)


@pytest.mark.parametrize("change", [{"update_every": 0}, {"inv_gamma": 0.0}, {"power": -1.0}])
def test_refuses_numbers_out_of_range(change: dict) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        EMA(nn.Linear(1, 1), **change)


def test_refuses_widths_that_no_profile_has() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.29"):
        EMA(nn.Linear(1, 1), profile="power", width=0.3)
    with pytest.raises(ValueError, match="two widths must differ"):
        PostHocEMA(nn.Linear(1, 1), (0.1, 0.1))


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_an_unknown_profile() -> None:
    with pytest.raises(ValueError, match="profile must be one of"):
        EMA(nn.Linear(1, 1), profile="cosine")  # pyright: ignore
