"""What a row of metrics tells of the steps since the last."""

import pytest
import torch
import torch.distributed as dist

from pipeline.meter import Meter


@pytest.fixture
def meter() -> Meter:
    """After two steps of three samples each, with much noise and with little."""
    meter = Meter(100, torch.device("cpu"))
    for timesteps, losses, norm in (([0, 24, 30], [1.0, 3.0, 4.0], 1.0), ([99] * 3, [7.0] * 3, 3)):
        meter.add(torch.tensor(losses), torch.tensor(timesteps))
        meter.add_step(torch.tensor(losses), torch.tensor(float(norm)))
    return meter


def test_losses_are_told_by_noise_from_little_to_much(meter: Meter) -> None:
    assert meter.last_loss == 7
    row = meter.take(world_size=1, seconds=4.0)
    assert row == {
        "loss": pytest.approx(29 / 6),
        "loss_by_noise": [2.0, 4.0, None, 7.0],
        "grad_norm": 2.0,
        "num_samples": 6,
        "steps_per_s": 0.5,
    }
    meter.add(torch.tensor([5.0]), torch.tensor([0]))  # what was taken is told once
    assert meter.take(world_size=1, seconds=1.0)["loss_by_noise"] == [5.0, None, None, None]


def test_ranks_make_their_steps_together(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda totals: totals.mul_(3))  # of three alike
    row = meter.take(world_size=3, seconds=4.0)
    assert (row["steps_per_s"], row["num_samples"], row["grad_norm"]) == (0.5, 18, 2.0)
    assert row["loss_by_noise"] == [2.0, 4.0, None, 7.0]
