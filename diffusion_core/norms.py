"""Normalisation with its modulation and activation in one step, forward and backward.

A residual block normalises, scales and shifts by timestep, and applies SiLU. Left to autograd,
that is a dozen passes over memory; here the gradient is written by hand, nothing but the input
is kept, and every pass runs along channels, which are contiguous in the channels-last layout.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NormKind = Literal["group", "rms", "layer"]
NORM_KINDS: tuple[NormKind, ...] = get_args(NormKind)

PER_CHANNEL = (1, 2)  # height and width of [batch, height, width, channel]
SMALLEST_NORM = 1e-12  # of a pixel's channels: what F.normalize divides by at least


class Norm(nn.Module):
    """Normalises, scales and shifts, and applies SiLU where asked to.

    `group` is GroupNorm, over space and the channels of a group; `rms` divides each pixel by the
    root mean square of its channels; `layer` also subtracts their mean.

    Args:
        kind: which of the three.
        dim: channels.
        groups: of `group`.

    Reference: Wu & He, Group Normalization (1803.08494), eq. 1; Zhang & Sennrich, RMSNorm
        (1910.07467), eq. 4; Ba et al., Layer Normalization (1607.06450), eq. 3.
    """

    def __init__(self, kind: NormKind, dim: int, groups: int = 1) -> None:
        super().__init__()
        self.kind: NormKind = kind
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "group" else None

    def forward(
        self,
        x: Float[Tensor, "batch channel height width"],
        modulation: Float[Tensor, "rows two_channel"] | None = None,
        *,
        silu: bool = False,
        residual: Float[Tensor, "batch channel height width"] | None = None,
        overwrite: bool = False,
    ) -> Float[Tensor, "batch channel height width"]:
        """The normalised x, times 1 + scale, plus shift: both halves of `modulation`.

        Args:
            x: what to normalise.
            modulation: scale and shift of each channel, one row a sample or one for all.
            silu: apply SiLU then.
            residual: what to add last.
            overwrite: x is not needed any more, and where no gradient is its memory is used.
        """
        if x.dtype == torch.float16:  # squares and inverses leave its range
            wide = None if modulation is None else modulation.float()
            more = None if residual is None else residual.float()
            return self(x.float(), wide, silu=silu, residual=more, overwrite=True).half()
        gain, shift = self.weight[None], None if self.bias is None else self.bias[None]
        if modulation is not None:
            scale, offset = modulation.chunk(2, dim=1)
            gain = gain * (scale + 1)
            shift = offset if shift is None else torch.addcmul(offset, shift, scale + 1)
        if self.kind == "layer":  # only old networks have it: left to autograd
            variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            y = (x - mean) * (variance + 1e-5).rsqrt() * gain[:, :, None, None]
            y = y if shift is None else y + shift[:, :, None, None]
            y = F.silu(y) if silu else y
            return y if residual is None else y + residual
        function = _GroupNorm if self.kind == "group" else _RMSNorm
        if not torch.is_grad_enabled():
            return function.compute(x, gain, shift, residual, self.groups, silu, overwrite)[0]
        return function.apply(x, gain, shift, residual, self.groups, silu)  # pyright: ignore


class _RMSNorm(torch.autograd.Function):
    """y = act(gain x / rms(x) + shift), the root mean square over a pixel's channels."""

    @staticmethod
    def compute(x, gain, shift, residual, groups, silu, overwrite=False):
        pixels = x.permute(0, 2, 3, 1)
        length = torch.linalg.vector_norm(pixels, dim=-1, keepdim=True, dtype=_at_least_float(x))
        inverse = (x.shape[1] ** 0.5 / length.clamp_(min=SMALLEST_NORM)).to(x.dtype)
        y = _finish_(
            torch.mul(pixels, inverse, out=pixels if overwrite else None),
            gain, shift, residual, silu,
        )  # fmt: skip
        return y, inverse

    @staticmethod
    def forward(ctx, x, gain, shift, residual, groups, silu):
        y, inverse = _RMSNorm.compute(x, gain, shift, residual, groups, silu)
        ctx.save_for_backward(x, inverse, gain, shift)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inverse, gain, shift = ctx.saved_tensors
        pixels, d_y = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        normal = pixels * inverse
        if ctx.silu:
            d_y = _silu_backward_(d_y, _affine(normal, gain, shift))
        product = d_y * normal
        d_gain = _sum_like(product, gain)
        d_shift = None if shift is None else _sum_like(d_y, shift)
        # n has length sqrt(C), so its gradient loses the part along n.
        wide_gain = _over_pixels(gain, x.dtype)
        along = product.mul_(wide_gain).mean(-1, keepdim=True)
        d_x = torch.mul(d_y, wide_gain, out=product).addcmul_(normal, along, value=-1)
        return d_x.mul_(inverse).permute(0, 3, 1, 2), d_gain, d_shift, _given(ctx, grad), None, None


class _GroupNorm(torch.autograd.Function):
    """y = act(gain (x - mean)/std + shift), mean and std over space and a group's channels."""

    @staticmethod
    def compute(x, gain, shift, residual, groups, silu, overwrite=False):
        pixels = x.permute(0, 2, 3, 1)
        mean = _group_mean(pixels.mean(PER_CHANNEL, dtype=_at_least_float(x)), groups)
        centred = torch.sub(pixels, _over_pixels(mean, x.dtype), out=pixels if overwrite else None)
        power = centred.square().mean(PER_CHANNEL, dtype=mean.dtype)
        inverse = (_group_mean(power, groups) + 1e-5).rsqrt_()
        y = _finish_(centred, inverse * gain, shift, residual, silu)
        return y, mean, inverse

    @staticmethod
    def forward(ctx, x, gain, shift, residual, groups, silu):
        y, mean, inverse = _GroupNorm.compute(x, gain, shift, residual, groups, silu)
        ctx.save_for_backward(x, mean, inverse, gain, shift)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, inverse, gain, shift = ctx.saved_tensors
        d_y = grad.permute(0, 2, 3, 1)
        centred = x.permute(0, 2, 3, 1) - _over_pixels(mean, x.dtype)
        if ctx.silu:
            d_y = _silu_backward_(d_y, _affine(centred, inverse * gain, shift))
        count = x.shape[2] * x.shape[3]
        sum_y = d_y.sum(PER_CHANNEL, dtype=mean.dtype)
        product = d_y * centred
        sum_product = product.sum(PER_CHANNEL, dtype=mean.dtype) * inverse
        # dx = inverse (dn - mean(dn) - n mean(dn n)), dn = gain dy, n = inverse centred
        on_centred = -(inverse**2) * _group_mean(gain * sum_product, ctx.groups) / count
        constant = -inverse * _group_mean(gain * sum_y, ctx.groups) / count
        d_x = _affine(d_y, inverse * gain, constant, out=product)
        d_x.addcmul_(centred, _over_pixels(on_centred, x.dtype))
        d_gain, d_shift = sum_product.sum_to_size(gain.shape), sum_y.sum_to_size(shift.shape)
        return d_x.permute(0, 3, 1, 2), d_gain, d_shift, _given(ctx, grad), None, None


def _over_pixels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, channel] as [rows, 1, 1, channel], to meet [batch, height, width, channel]."""
    return values[:, None, None].to(dtype)


def _affine(x: Tensor, gain: Tensor, shift: Tensor | None, out: Tensor | None = None) -> Tensor:
    if shift is None:
        return torch.mul(x, _over_pixels(gain, x.dtype), out=out)
    return torch.addcmul(_over_pixels(shift, x.dtype), x, _over_pixels(gain, x.dtype), out=out)


def _finish_(
    x: Tensor, gain: Tensor, shift: Tensor | None, residual: Tensor | None, silu: bool
) -> Tensor:
    """Scales, shifts, activates and adds in x's own memory; channels second again."""
    y = _affine(x, gain, shift, out=x)
    y = (F.silu(y, inplace=True) if silu else y).permute(0, 3, 1, 2)
    return y if residual is None else y.add_(residual)


def _silu_backward_(grad: Tensor, before: Tensor) -> Tensor:
    """The gradient before SiLU, in the memory of SiLU's input."""
    return torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=before)


def _given(ctx, grad: Tensor) -> Tensor | None:
    """A residual's gradient is the output's."""
    return grad if ctx.needs_input_grad[3] else None


def _sum_like(pixels: Tensor, like: Tensor) -> Tensor:
    """The sum over space, and over samples where they share one row."""
    return pixels.sum(PER_CHANNEL, dtype=like.dtype).sum_to_size(like.shape)


def _group_mean(values: Tensor, groups: int) -> Tensor:
    """[batch, channel]: each channel gets the mean of its group."""
    grouped = values.unflatten(1, (groups, values.shape[1] // groups))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(1)


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
