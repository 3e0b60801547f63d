"""The small networks of introductory texts: a minimal U-Net and an MLP for point data.

Each is read in a minute and trained in a minute; `examples/` does so. The network for real work,
with timestep embeddings, residual blocks and attention, is in `unet.py`.
"""

from itertools import pairwise

import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn


class TinyUNet(nn.Module):
    """The minimal U-Net: three convolutions down, three up, additive skips, no time input.

    It is called as `model(x_t, t)` like every network here and ignores t. What that means: it
    must infer the noise level from the image itself, which many pixels allow and few do not, and
    a sampler cannot tell it how noisy x_t ought to be; it answers for how noisy x_t looks.

    Args:
        channels: of the image.
        dim: channels after the first convolution; twice as many further down.

    Raises:
        ValueError: at the call, an input that is not [batch, channels, height, width], or sides
            that its two poolings cannot halve.
    """

    size_divisor = 4

    def __init__(self, channels: int = 1, dim: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.down1 = _convolution(channels, dim)
        self.down2 = _convolution(dim, 2 * dim)
        self.down3 = _convolution(2 * dim, 2 * dim)
        self.up1 = _convolution(2 * dim, 2 * dim)
        self.up2 = _convolution(2 * dim, dim)
        self.up3 = _convolution(dim, channels)

    def forward(
        self,
        x_t: Float[Tensor, "batch channel height width"],
        t: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """The network's output for noised images; t is ignored."""
        if x_t.ndim != 4 or x_t.shape[1] != self.channels:
            raise ValueError(
                f"TinyUNet takes [batch, {self.channels}, height, width], got {list(x_t.shape)}. "
                "Change the input or the network's channels."
            )
        if any(side % self.size_divisor for side in x_t.shape[2:]):
            raise ValueError(
                f"Images must have sides divisible by {self.size_divisor} for TinyUNet, got "
                f"{tuple(x_t.shape[2:])}. Pad or resize them."
            )
        full = F.silu(self.down1(x_t))
        half = F.silu(self.down2(F.max_pool2d(full, 2)))
        h = F.silu(self.down3(F.max_pool2d(half, 2)))
        h = F.silu(self.up1(h))
        h = F.silu(self.up2(_double(h) + half))
        return self.up3(_double(h) + full)  # no activation: targets have either sign


class PointMLP(nn.Module):
    """A perceptron for points: three hidden layers, each told the timestep in its own words.

    Every hidden layer owns an embedding of the timestep, learned and not computed, which is added
    to the layer's output before the activation. So each timestep is learned on its own, and the
    network serves the number of timesteps that it was built for.

    Args:
        features: coordinates of a point.
        hidden: width of the hidden layers.
        num_train_timesteps: T of the schedule.

    Raises:
        ValueError: at the call, an input that is not [batch, features], or a timestep outside
            0..num_train_timesteps - 1.
    """

    def __init__(
        self, features: int = 2, hidden: int = 128, num_train_timesteps: int = 100
    ) -> None:
        super().__init__()
        self.features = features
        self.num_train_timesteps = num_train_timesteps
        widths = (features, hidden, hidden, hidden)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.steps = nn.ModuleList(nn.Embedding(num_train_timesteps, hidden) for _ in self.layers)
        self.output = nn.Linear(hidden, features)

    def forward(
        self, x_t: Float[Tensor, "batch feature"], t: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch feature"]:
        """The network's output for noised points."""
        if x_t.ndim != 2 or x_t.shape[1] != self.features:
            raise ValueError(
                f"PointMLP takes [batch, {self.features}], got {list(x_t.shape)}. "
                "Change the input or the network's features."
            )
        if int(t.min()) < 0 or int(t.max()) >= self.num_train_timesteps:
            raise ValueError(
                f"PointMLP was built for timesteps 0..{self.num_train_timesteps - 1}, got "
                f"{int(t.min())}..{int(t.max())}. Set its num_train_timesteps to the schedule's."
            )
        h = x_t
        for layer, step in zip(self.layers, self.steps, strict=True):
            h = F.relu(layer(h) + step(t))
        return self.output(h)


def _convolution(dim_in: int, dim_out: int) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim_out, 5, padding=2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
