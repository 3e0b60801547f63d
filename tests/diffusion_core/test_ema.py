import pytest
import torch
from torch import nn

from diffusion_core import EMA


def test_equals_its_closed_form() -> None:
    model = nn.Linear(2, 2, bias=False)
    start = model.weight.detach().clone()
    ema = EMA(model, decay=0.9)
    expected = start.double()
    for k in range(200):
        with torch.no_grad():
            model.weight.fill_(k)
        ema.update(model)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
    got = ema.model.weight
    assert isinstance(got, torch.Tensor)
    assert torch.allclose(got.double(), expected, rtol=1e-5)
    assert ema.num_updates == 200


def test_copies_buffers_and_leaves_the_model_alone() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model)
    with torch.no_grad():
        model.running_mean.fill_(3.0)  # pyright: ignore
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)  # pyright: ignore
    assert model.weight.requires_grad
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_refuses_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)
