import pytest
import torch

from diffusion_core import PointMLP, TinyUNet


def test_tiny_unet_keeps_the_shape_and_ignores_the_timestep() -> None:
    torch.manual_seed(0)
    model = TinyUNet(channels=3, dim=8)
    x = torch.randn(2, 3, 8, 12)
    early, late = model(x, torch.tensor([0, 0])), model(x, torch.tensor([999, 7]))
    assert early.shape == x.shape
    assert torch.equal(early, late)


def test_tiny_unet_sees_the_whole_of_a_small_image() -> None:
    torch.manual_seed(0)
    model = TinyUNet(dim=8)
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    model(x, torch.tensor([0]))[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any(dim=2).all())
    assert bool((x.grad[..., 7, 7] != 0).all())


def test_tiny_unet_carries_each_resolution_over_its_skip() -> None:
    torch.manual_seed(0)
    model, x, t = TinyUNet(dim=8), torch.randn(1, 1, 8, 8), torch.tensor([0])
    for below in (model.down2, model.down3):  # what is left is the skip above the silenced layer
        for parameter in below.parameters():
            torch.nn.init.zeros_(parameter)
    assert not torch.allclose(model(x, t), model(x.flip(3), t))


def test_tiny_unet_puts_out_either_sign() -> None:
    torch.manual_seed(0)
    output = TinyUNet()(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)).detach()
    assert float(output.min()) < 0 < float(output.max())


def test_tiny_unet_refuses_other_sides_and_names_the_divisor() -> None:
    with pytest.raises(ValueError, match=r"divisible by 4 for TinyUNet, got \(8, 10\)"):
        TinyUNet()(torch.zeros(1, 1, 8, 10), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"takes \[batch, 1, height, width\], got \[1, 3, 8, 8\]"):
        TinyUNet()(torch.zeros(1, 3, 8, 8), torch.tensor([0]))


def test_point_mlp_is_the_written_out_formula() -> None:
    torch.manual_seed(0)
    model = PointMLP(features=3, hidden=16, num_train_timesteps=10)
    x, t = torch.randn(5, 3), torch.tensor([0, 9, 4, 4, 1])
    h = x
    for layer, step in zip(model.layers, model.steps, strict=True):
        h = torch.relu(h @ layer.weight.T + layer.bias + step.weight[t])  # pyright: ignore
    expected = h @ model.output.weight.T + model.output.bias
    assert len(model.layers) == 3
    assert torch.allclose(model(x, t), expected, atol=1e-6)


def test_point_mlp_depends_on_the_timestep() -> None:
    torch.manual_seed(0)
    model, x = PointMLP(), torch.randn(1, 2).expand(2, 2)
    early, late = model(x, torch.tensor([0, 99]))
    assert not torch.allclose(early, late)


@pytest.mark.parametrize("t", [-1, 10])
def test_point_mlp_refuses_timesteps_it_was_not_built_for(t: int) -> None:
    with pytest.raises(ValueError, match=rf"timesteps 0\.\.9, got {t}\.\.{t}"):
        PointMLP(num_train_timesteps=10)(torch.zeros(1, 2), torch.tensor([t]))


def test_point_mlp_refuses_other_features() -> None:
    with pytest.raises(ValueError, match=r"takes \[batch, 2\], got \[1, 3\]"):
        PointMLP()(torch.zeros(1, 3), torch.tensor([0]))
