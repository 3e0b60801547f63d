"""The fused normalisation against torch's own operations, values and gradients."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from diffusion_core.norms import NORM_KINDS, Norm, NormKind

SHAPE = (3, 8, 4, 6)


def plain(norm: Norm, x: Tensor, modulation: Tensor | None, silu: bool) -> Tensor:
    """The same by the definitions, one operation after the other."""
    match norm.kind:
        case "group":
            x = F.group_norm(x, norm.groups, norm.weight, norm.bias)
        case "rms":
            x = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * norm.weight[:, None, None]
        case "layer":
            x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm.weight).permute(0, 3, 1, 2)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        x = x * (scale + 1) + shift
    return F.silu(x) if silu else x


def make_norm(kind: NormKind) -> Norm:
    norm = Norm(kind, 8, groups=2).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_definition(
    kind: NormKind, silu: bool, rows: int | None, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    norm = make_norm(kind)
    x = torch.randn(SHAPE, dtype=torch.float64).contiguous(memory_format=layout) + 0.5
    modulation = None if rows is None else torch.randn(rows, 16, dtype=torch.float64)
    inputs = [x, *([] if modulation is None else [modulation]), *norm.parameters()]
    for tensor in inputs:
        tensor.requires_grad_()
    got = norm(x, modulation, silu=silu)
    expected = plain(norm, x, modulation, silu)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)

    weights = torch.randn(SHAPE, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    for mine, theirs in pairs:
        assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-9)
    residual = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(norm(x, modulation, silu=silu), got)
        again = norm(x.clone(), modulation, silu=silu, residual=residual, overwrite=True)
        assert torch.allclose(again, got + residual, atol=1e-12)


@pytest.mark.parametrize("kind", ["group", "rms"])
def test_gradient_is_the_numerical_one(kind: NormKind) -> None:
    norm = make_norm(kind)
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    modulation = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, m, r, *_: norm(x, m, silu=True, residual=r, overwrite=True),
        (x, modulation, residual, *norm.parameters()),
    )


@pytest.mark.parametrize("kind", ["group", "rms"])
def test_half_precision_keeps_its_type_and_three_digits(kind: NormKind) -> None:
    norm = make_norm(kind)
    x = torch.randn(SHAPE, dtype=torch.float64)
    expected = norm(x, silu=True)
    got = norm.float().bfloat16()(x.bfloat16(), silu=True)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), expected, atol=0.06)


@pytest.mark.parametrize("kind", ["group", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pixels_of_zero_stay_finite(kind: NormKind, dtype: torch.dtype) -> None:
    norm = Norm(kind, 8, groups=2).to(dtype)
    x = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    y = norm(x, silu=True)
    y.sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(y).all())
    if dtype != torch.float16:  # the slope there is above 65504
        assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("kind", ["group", "rms"])
@pytest.mark.parametrize("size", [1e-4, 3000.0])
def test_float16_does_not_overflow(kind: NormKind, size: float) -> None:
    torch.manual_seed(0)
    norm = Norm(kind, 8, groups=2)
    x = (size * torch.randn(SHAPE)).half()
    expected = norm(x.float(), silu=True)
    assert torch.allclose(norm.half()(x, silu=True).float(), expected, atol=5e-3)


@pytest.mark.parametrize("kind", ["group", "rms"])
def test_a_batch_of_none_is_none(kind: NormKind) -> None:
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    y = Norm(kind, 8, groups=2)(x, silu=True)
    y.sum().backward()
    assert y.shape == x.shape
