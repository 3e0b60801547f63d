"""Convolutions that torch has no module for: resampling in one step, standardised weights."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights are normalised for each output channel.

    Reference: Qiao et al., Weight Standardization (1903.10520), section 3.
    """

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return self._conv_forward(input, weight, self.bias)


class UpsampleConv2d(nn.Conv2d):
    """Doubles the sides by nearest neighbours and convolves, as one transposed convolution.

    Of three taps on the enlarged image two always meet the same source pixel, so their weights
    are added up first: in two dimensions 4 multiplications are left of 9, with the same result.

    Args:
        dim_in: channels of the input.
        dim_out: channels of the output.
        is_flat: the height is 1 and stays so.
    """

    def __init__(self, dim_in: int, dim_out: int, is_flat: bool = False) -> None:
        super().__init__(dim_in, dim_out, (1 if is_flat else 3, 3))
        self.is_flat = is_flat

    def forward(self, input: Tensor) -> Tensor:
        weight = _spread(self.weight.transpose(0, 1), -1)
        if self.is_flat:
            return F.conv_transpose2d(input, weight, self.bias, (1, 2), (0, 1))
        return F.conv_transpose2d(input, _spread(weight, -2), self.bias, 2, 1)


def _spread(weight: Tensor, axis: int) -> Tensor:
    """Three taps on doubled pixels as four of a transposed convolution of stride 2."""
    first, second, third = weight.unbind(axis)
    return torch.stack([third, second + third, first + second, first], axis)
