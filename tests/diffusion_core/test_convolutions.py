import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from diffusion_core.convolutions import StandardizedConv2d, UpsampleConv2d


@pytest.mark.parametrize("is_flat", [False, True])
def test_upsampling_convolution_is_one_after_the_other(is_flat: bool) -> None:
    torch.manual_seed(0)
    layer = UpsampleConv2d(3, 4, is_flat).double()
    x = torch.randn(2, 3, 1 if is_flat else 5, 6, dtype=torch.float64, requires_grad=True)
    factor, padding = ((1.0, 2.0), (0, 1)) if is_flat else ((2.0, 2.0), (1, 1))
    larger = F.interpolate(x, scale_factor=factor, mode="nearest")
    expected = F.conv2d(larger, layer.weight, layer.bias, padding=padding)
    got = layer(x)
    assert torch.allclose(got, expected, atol=1e-12)
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    for mine, theirs in pairs:
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_standardized_weights_have_mean_0_and_variance_1() -> None:
    layer = StandardizedConv2d(3, 4, 3, padding=1).double()
    rows = layer.weight.detach().flatten(1).numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.var(1, keepdims=True) + 1e-5) ** 0.5
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    weight = torch.from_numpy(expected).reshape(layer.weight.shape)
    assert torch.allclose(layer(x), F.conv2d(x, weight, layer.bias, padding=1), atol=1e-10)
