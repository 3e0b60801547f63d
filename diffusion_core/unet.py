"""The U-Net: a denoiser for images, conditioned on the timestep.

The layout is that of denoising-diffusion-pytorch: two residual blocks and an attention per
level, pixel-unshuffle down, nearest upsample and convolution up, a skip from every block.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

Attention = Literal["none", "full"]


@dataclass(frozen=True)
class UNetConfig:
    """Everything that determines a `UNet`.

    Args:
        channels: of the image.
        dim: channels at the first level.
        dim_mults: each level's channels as a multiple of dim; each level but the last halves
            the resolution.
        attention: one for each level; the middle always attends.
        heads: of attention.
        head_dim: channels of each head.
        norm_groups: groups of the GroupNorm in blocks; must divide every level's channels.
        dropout: in residual blocks, 0 to 1.
    """

    channels: int = 3
    dim: int = 64
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    attention: tuple[Attention, ...] = ("none", "none", "none", "full")
    heads: int = 4
    head_dim: int = 32
    norm_groups: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.dim_mults):
            raise ValueError(
                f"model.attention must name one kind for each of the {len(self.dim_mults)} "
                f"levels of model.dim_mults, got {len(self.attention)}. Make them equally long."
            )
        unknown = set(self.attention) - set(get_args(Attention))
        if unknown:
            raise ValueError(
                f"model.attention must hold {' or '.join(get_args(Attention))}, "
                f"got {sorted(unknown)}. Choose one of these for each level."
            )
        if self.dim % 2 or self.dim % self.norm_groups:
            raise ValueError(
                f"model.dim must be even and divisible by model.norm_groups = "
                f"{self.norm_groups}, got {self.dim}. Use a multiple of it."
            )

    @property
    def size_divisor(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.dim_mults) - 1)


class UNet(nn.Module):
    """Predicts, from a noised image and its timestep, what the objective asks for.

    Raises:
        ValueError: at the call, an image whose sides the levels cannot halve.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        dim, time_dim = config.dim, config.dim * 4
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(dim), nn.Linear(dim, time_dim), nn.GELU(),
            nn.Linear(time_dim, time_dim),
        )  # fmt: skip
        self.init_conv = nn.Conv2d(config.channels, dim, 7, padding=3)

        def block(dim_in: int, dim_out: int) -> ResidualBlock:
            return ResidualBlock(dim_in, dim_out, time_dim, config.norm_groups, config.dropout)

        def attention(kind: Attention, dim: int) -> nn.Module:
            return nn.Identity() if kind == "none" else FullAttention(dim, config)

        dims = [dim, *(dim * m for m in config.dim_mults)]
        levels = list(zip(dims[:-1], dims[1:], config.attention, strict=True))
        last = len(levels) - 1
        self.downs = nn.ModuleList()
        for i, (dim_in, dim_out, kind) in enumerate(levels):
            resample = (
                nn.Conv2d(dim_in, dim_out, 3, padding=1)
                if i == last
                else nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(dim_in * 4, dim_out, 1))
            )
            self.downs.append(
                Level(
                    block(dim_in, dim_in), block(dim_in, dim_in), attention(kind, dim_in), resample
                )
            )
        self.mid_block1 = block(dims[-1], dims[-1])
        self.mid_attention = attention("full", dims[-1])
        self.mid_block2 = block(dims[-1], dims[-1])
        self.ups = nn.ModuleList()
        for i, (dim_in, dim_out, kind) in reversed(list(enumerate(levels))):
            conv = nn.Conv2d(dim_out, dim_in, 3, padding=1)
            resample = conv if i == 0 else nn.Sequential(nn.Upsample(scale_factor=2), conv)
            self.ups.append(
                Level(
                    block(dim_out + dim_in, dim_out),
                    block(dim_out + dim_in, dim_out),
                    attention(kind, dim_out),
                    resample,
                )
            )
        self.final_block = block(dim * 2, dim)
        self.final_conv = nn.Conv2d(dim, config.channels, 1)
        nn.init.zeros_(self.final_conv.weight)  # the first prediction is 0: a calm start
        nn.init.zeros_(_bias(self.final_conv))

    def forward(
        self, x_t: Float[Tensor, "batch channel height width"], t: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch channel height width"]:
        """The network's output for x_t at timesteps t (0-based)."""
        divisor = self.config.size_divisor
        if x_t.shape[-2] % divisor or x_t.shape[-1] % divisor:
            raise ValueError(
                f"Images must have sides divisible by {divisor} for {len(self.downs)} levels, "
                f"got {tuple(x_t.shape[-2:])}. Change data.resolution or model.dim_mults."
            )
        time = self.time_embedding(t)
        x = first = self.init_conv(x_t)
        skips: list[Tensor] = []
        for level in cast("Iterable[Level]", self.downs):
            x = level.block1(x, time)
            skips.append(x)
            x = level.attention(level.block2(x, time))
            skips.append(x)
            x = level.resample(x)
        x = self.mid_block2(self.mid_attention(self.mid_block1(x, time)), time)
        for level in cast("Iterable[Level]", self.ups):
            x = level.block1(torch.cat([x, skips.pop()], dim=1), time)
            x = level.block2(torch.cat([x, skips.pop()], dim=1), time)
            x = level.resample(level.attention(x))
        return self.final_conv(self.final_block(torch.cat([x, first], dim=1), time))


class Level(nn.Module):
    """The parts of one resolution; `UNet.forward` wires them, skips being its business."""

    def __init__(
        self, block1: nn.Module, block2: nn.Module, attention: nn.Module, resample: nn.Module
    ) -> None:
        super().__init__()
        self.block1, self.block2 = block1, block2
        self.attention, self.resample = attention, resample


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the first modulated by the timestep's scale and shift."""

    def __init__(
        self, dim_in: int, dim_out: int, time_dim: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, dim_out * 2))
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, dim_out)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch dim_in height width"], time: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch dim_out height width"]:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        h = F.silu(self.norm2(self.conv2(self.dropout(h))))
        return h + self.skip(x)


class FullAttention(nn.Module):
    """Softmax attention over all pixels, with a residual."""

    def __init__(self, dim: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = config.heads
        hidden = config.heads * config.head_dim
        self.norm = nn.GroupNorm(1, dim)
        self.to_qkv = nn.Conv2d(dim, hidden * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, 1)

    def forward(
        self, x: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        batch, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).view(batch, 3, self.heads, -1, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(out.transpose(-1, -2).reshape(batch, -1, height, width))


class SinusoidalEmbedding(nn.Module):
    """sin and cos of t at geometrically spaced frequencies.

    Reference: Vaswani et al. (1706.03762), section 3.5.
    """

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(theta) / max(half - 1, 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Int64[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        angles = t[:, None].to(self.frequencies.dtype) * self.frequencies[None]  # pyright: ignore
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
