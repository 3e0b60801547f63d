"""The U-Net: a denoiser for images and sequences, conditioned on the timestep.

Two residual blocks and an attention per level, a skip from every block, resampling between
levels. It expresses the networks of denoising-diffusion-pytorch exactly (`interop.py` reads
their weights). A sequence is treated as an image of height 1, so that there is one
implementation. Normalisation is in `norms.py`, attention in `attention.py`, small networks for
teaching in `networks.py`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion_core.attention import FullAttention, LinearAttention
from diffusion_core.convolutions import StandardizedConv2d, UpsampleConv2d
from diffusion_core.norms import Norm

Attention = Literal["none", "linear", "full"]
BlockNorm = Literal["group", "rms"]
Downsample = Literal["unshuffle", "strided"]
TimeFeatures = Literal["sinusoidal", "learned", "random"]
Size = tuple[int, int]


@dataclass(frozen=True)
class UNetConfig:
    """Everything that determines a `UNet`.

    Args:
        channels: of the image or sequence.
        dim: channels at the first level.
        dim_mults: each level's channels as a multiple of dim; each level but the last halves
            the resolution.
        attention: one for each level; the middle always attends fully.
        heads: of attention, one number for all levels or one for each.
        head_dim: channels of each head, likewise. The middle has the last level's, or a number of
            its own where one more is given than there are levels.
        norm: in residual blocks. Attention is normalised by RMSNorm.
        norm_groups: groups of GroupNorm; must divide every level's channels.
        dropout: in residual blocks, 0 to 1.
        is_sequence: x is [batch, channel, length].
        init_dim: channels before the first level; dim when not given.
        memory_kv: learned keys and values in each attention.
        downsample: `unshuffle` is a pixel-unshuffle and a 1x1 convolution, `strided` a
            convolution of kernel 4 and stride 2.
        time_features: `sinusoidal`; Fourier features `learned` or `random` and fixed, which also
            take t itself.
        time_features_dim: number of Fourier features, even.
        time_theta: the longest period of sinusoidal features over 2 pi.
        self_condition: also takes an earlier guess of the clean data.
        num_classes: also takes class labels 0..num_classes - 1; num_classes is the null label.
        learned_variance: twice the output channels, the second half for the variance.
        has_old_layout: as denoising-diffusion-pytorch up to 1.6: standardised weights in blocks,
            LayerNorm around attention, and in images linear attention over the pixel count.

    Raises:
        ValueError: values that do not go together.
    """

    channels: int = 3
    dim: int = 64
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    attention: tuple[Attention, ...] = ("linear", "linear", "linear", "full")
    heads: int | tuple[int, ...] = 4
    head_dim: int | tuple[int, ...] = 32
    norm: BlockNorm = "group"
    norm_groups: int = 8
    dropout: float = 0.0
    is_sequence: bool = False
    init_dim: int | None = None
    memory_kv: int = 0
    downsample: Downsample = "unshuffle"
    time_features: TimeFeatures = "sinusoidal"
    time_features_dim: int = 16
    time_theta: float = 10000.0
    self_condition: bool = False
    num_classes: int | None = None
    learned_variance: bool = False
    has_old_layout: bool = False

    def __post_init__(self) -> None:
        levels = len(self.dim_mults)
        sizes = (self.channels, self.dim, self.norm_groups, self.first_dim, levels)
        lists = (self.dim_mults, self.heads, self.head_dim)
        if min(*sizes, *(n for v in lists for n in (v if isinstance(v, tuple) else (v,)))) < 1:
            raise ValueError(
                f"A U-Net's channels, dims, heads and groups must be 1 or more, got {self}. "
                "Raise those that are not."
            )
        for name, more in (("attention", 0), ("heads", 1), ("head_dim", 1)):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) not in (levels, levels + more):
                raise ValueError(
                    f"model.{name} must name one for each of the {levels} levels of "
                    f"model.dim_mults, got {len(value)}. Make them equally long."
                )
        for name, value, allowed in (
            ("attention", set(self.attention), Attention),
            ("norm", {self.norm}, BlockNorm),
            ("downsample", {self.downsample}, Downsample),
            ("time_features", {self.time_features}, TimeFeatures),
        ):
            if value - set(get_args(allowed)):
                raise ValueError(
                    f"model.{name} must be of {', '.join(get_args(allowed))}, got "
                    f"{', '.join(map(str, sorted(value)))}. Choose from these."
                )
        if self.dim % 2 or (self.norm == "group" and self.dim % self.norm_groups):
            raise ValueError(
                f"model.dim must be even and divisible by model.norm_groups = "
                f"{self.norm_groups}, got {self.dim}. Use a multiple of it."
            )
        if self.norm == "group" and self.first_dim % self.norm_groups:
            raise ValueError(
                f"UNetConfig.init_dim must be divisible by norm_groups = {self.norm_groups}, got "
                f"{self.init_dim}. Use a multiple of it."
            )
        if self.time_features_dim % 2:
            raise ValueError(
                f"UNetConfig.time_features_dim must be even, got {self.time_features_dim}. "
                "Raise it by one: sines and cosines come in pairs."
            )

    @property
    def first_dim(self) -> int:
        """Channels after the first convolution."""
        return self.init_dim or self.dim

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.channels * (2 if self.learned_variance else 1)

    @property
    def size_divisor(self) -> int:
        """What height and width, or the length, must be multiples of."""
        return 2 ** (len(self.dim_mults) - 1)

    def at_level(self, name: Literal["heads", "head_dim"], level: int) -> int:
        """`heads` or `head_dim` of a level; -1 is the middle."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value


class UNet(nn.Module):
    """Predicts, from a noised image and its timestep, what the objective asks for.

    Weights and activations are kept channels-last whatever the layout of the input. Where no
    gradient is asked for, memory between layers is used again: forward hooks must clone what
    they keep. There are no second derivatives.

    Args:
        config: what it is made of.

    Raises:
        ValueError: at the call, an input of another kind, sides that the levels cannot halve, or
            labels or a guess given to a network that does not take them.

    Reference: Ho et al., DDPM (2006.11239), appendix B, in the form of
        denoising-diffusion-pytorch.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embedding = TimeEmbedding(config)
        inputs = config.channels * (2 if config.self_condition else 1)
        self.init_conv = _conv(config, inputs, config.first_dim, 7)

        dims = [config.first_dim, *(config.dim * m for m in config.dim_mults)]
        levels = list(enumerate(zip(dims[:-1], dims[1:], config.attention, strict=True)))
        last = len(levels) - 1

        def level(i: int, block_dims: Size, kind: Attention, resample: nn.Module) -> Level:
            return Level(
                ResidualBlock(config, *block_dims),
                ResidualBlock(config, *block_dims),
                _attention(config, kind, block_dims[1], i),
                resample,
            )

        self.downs = nn.ModuleList()
        for i, (dim_in, dim_out, kind) in levels:
            resample = _conv(config, dim_in, dim_out, 3) if i == last else (
                _downsample(config, dim_in, dim_out)
            )  # fmt: skip
            self.downs.append(level(i, (dim_in, dim_in), kind, resample))
        self.mid_block1 = ResidualBlock(config, dims[-1], dims[-1])
        self.mid_attention = _attention(config, "full", dims[-1], -1)
        self.mid_block2 = ResidualBlock(config, dims[-1], dims[-1])
        self.ups = nn.ModuleList()
        for i, (dim_in, dim_out, kind) in reversed(levels):
            resample = _conv(config, dim_out, dim_in, 3) if i == 0 else (
                UpsampleConv2d(dim_out, dim_in, config.is_sequence)
            )  # fmt: skip
            self.ups.append(level(i, (dim_out + dim_in, dim_out), kind, resample))
        self.final_block = ResidualBlock(config, config.first_dim * 2, config.first_dim)
        self.final_conv = _conv(config, config.first_dim, config.out_channels, 1)
        nn.init.zeros_(self.final_conv.weight)  # the first prediction is 0: a calm start
        nn.init.zeros_(_bias(self.final_conv))

        # One product gives every block its scale and shift.
        self.block_widths = [2 * block.dim_out for block in self.blocks()]
        self.modulation = nn.Linear(config.dim * 4, sum(self.block_widths))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def blocks(self) -> Iterator["ResidualBlock"]:
        """The residual blocks in the order they run."""
        return (module for module in self.modules() if isinstance(module, ResidualBlock))

    def forward(
        self,
        x_t: Float[Tensor, "batch channel *size"],
        t: Int64[Tensor, " batch"],
        x_self_cond: Float[Tensor, "batch channel *size"] | None = None,
        class_labels: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_channel *size"]:
        """The network's output.

        Args:
            x_t: noised images [batch, channel, height, width], or sequences.
            t: their timesteps, 0-based. One timestep expanded to the batch is embedded once.
            x_self_cond: the earlier guess of the clean data; zeros when not given.
            class_labels: one for each sample; the null label when not given.
        """
        self._check(x_t, x_self_cond, class_labels)
        x = x_t
        if self.config.self_condition:
            guess = torch.zeros_like(x_t) if x_self_cond is None else x_self_cond
            x = torch.cat([guess, x_t], dim=1)
        if self.config.is_sequence:
            x = x[:, :, None]
        x = x.contiguous(memory_format=torch.channels_last)
        embedding = self.modulation(F.silu(self.time_embedding(t, class_labels)))
        modulations = iter(embedding.split(self.block_widths, dim=1))

        x = first = self.init_conv(x)
        skips: list[Tensor] = []
        for level in cast("Iterable[Level]", self.downs):
            x = level.block1(x, next(modulations))
            skips.append(x)
            x = level.attention(level.block2(x, next(modulations)))
            skips.append(x)
            x = level.resample(x)
        x = self.mid_block1(x, next(modulations))
        x = self.mid_block2(self.mid_attention(x), next(modulations))
        for level in cast("Iterable[Level]", self.ups):
            x = level.block1(torch.cat([x, skips.pop()], dim=1), next(modulations))
            x = level.block2(torch.cat([x, skips.pop()], dim=1), next(modulations))
            x = level.resample(level.attention(x))
        x = self.final_block(torch.cat([x, first], dim=1), next(modulations))
        output = self.final_conv(x)
        return output.squeeze(2) if self.config.is_sequence else output

    def _check(self, x_t: Tensor, x_self_cond: Tensor | None, class_labels: Tensor | None) -> None:
        config, sides = self.config, tuple(x_t.shape[2:])
        if len(sides) != (1 if config.is_sequence else 2) or x_t.shape[1] != config.channels:
            raise ValueError(
                f"This U-Net takes [batch, {config.channels}, "
                f"{'length' if config.is_sequence else 'height, width'}], got "
                f"{list(x_t.shape)}. Change the input or the model's channels and is_sequence."
            )
        divisor = config.size_divisor
        if any(side % divisor for side in sides):
            raise ValueError(
                f"Images must have sides divisible by {divisor} for {len(self.downs)} levels, "
                f"got {sides}. Change data.resolution or model.dim_mults."
            )
        if x_self_cond is not None and not config.self_condition:
            raise ValueError(
                "This U-Net takes no guess of the clean data and was given one. Set its "
                "self_condition, as the Diffusion's is."
            )
        if class_labels is not None and config.num_classes is None:
            raise ValueError(
                "This U-Net has no classes and was given labels. Set UNetConfig.num_classes, "
                "which model.class_conditional of a config does."
            )


class Level(nn.Module):
    """The parts of one resolution; `UNet.forward` wires them, skips being its business."""

    def __init__(
        self, block1: nn.Module, block2: nn.Module, attention: nn.Module, resample: nn.Module
    ) -> None:
        super().__init__()
        self.block1, self.block2 = block1, block2
        self.attention, self.resample = attention, resample


class ResidualBlock(nn.Module):
    """Two convolutions of width 3, the first modulated by the timestep's scale and shift."""

    def __init__(self, config: UNetConfig, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.dim_out = dim_out
        self.conv1 = _conv(config, dim_in, dim_out, 3, config.has_old_layout)
        self.norm1 = Norm(config.norm, dim_out, config.norm_groups)
        self.conv2 = _conv(config, dim_out, dim_out, 3, config.has_old_layout)
        self.norm2 = Norm(config.norm, dim_out, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Identity() if dim_in == dim_out else _conv(config, dim_in, dim_out, 1)

    def forward(
        self,
        x: Float[Tensor, "batch dim_in height width"],
        modulation: Float[Tensor, "rows two_dim_out"],
    ) -> Float[Tensor, "batch dim_out height width"]:
        h = self.norm1(self.conv1(x), modulation, silu=True, overwrite=True)
        h = self.conv2(self.dropout(h))
        return self.norm2(h, silu=True, residual=self.skip(x), overwrite=True)


class TimeEmbedding(nn.Module):
    """The timestep, and the class where there are classes, as a vector.

    Reference: sinusoidal: Vaswani et al. (1706.03762), section 3.5; Fourier features: Tancik et
        al. (2006.10739), eq. 5; labels: Dhariwal & Nichol (2105.05233), section 3.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.kind = config.time_features
        dim, time_dim = config.dim, config.dim * 4
        self.num_waves, self.theta = dim // 2, config.time_theta
        num_features = dim
        if self.kind != "sinusoidal":
            num_features = config.time_features_dim + 1
            weights = torch.randn(config.time_features_dim // 2)
            if self.kind == "learned":
                self.frequencies = nn.Parameter(weights)
            else:
                self.register_buffer("frequencies", weights)
        self.mlp = nn.Sequential(
            nn.Linear(num_features, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        )
        self.classes = None
        if config.num_classes is not None:
            self.classes = nn.Embedding(config.num_classes + 1, time_dim)

    def forward(
        self, t: Int64[Tensor, " batch"], class_labels: Int64[Tensor, " batch"] | None
    ) -> Float[Tensor, "rows time"]:
        if t.stride() == (0,):  # one timestep for all: its rows would be equal
            t = t[:1]
        steps = t[:, None].float()  # half precision cannot tell one timestep from the next
        if self.kind == "sinusoidal":
            waves = torch.arange(self.num_waves, device=t.device)
            rate = -(math.log(self.theta) / max(self.num_waves - 1, 1))
            angles = steps * (waves * rate).exp()
            features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        else:
            angles = steps * cast("Tensor", self.frequencies).float() * 2 * math.pi
            features = torch.cat([steps, angles.sin(), angles.cos()], dim=-1)
        embedding = self.mlp(features.to(cast("nn.Linear", self.mlp[0]).weight.dtype))
        if self.classes is None:
            return embedding
        if class_labels is None:
            class_labels = torch.full_like(t, self.classes.num_embeddings - 1)
        return embedding + self.classes(class_labels)


def _conv(
    config: UNetConfig, dim_in: int, dim_out: int, width: int, is_standardized: bool = False
) -> nn.Conv2d:
    kernel = (1, width) if config.is_sequence else (width, width)
    kind = StandardizedConv2d if is_standardized else nn.Conv2d
    return kind(dim_in, dim_out, kernel, padding=(kernel[0] // 2, width // 2))


def _downsample(config: UNetConfig, dim_in: int, dim_out: int) -> nn.Conv2d:
    """Halves the sides; an unshuffle and a 1x1 convolution are one convolution of stride 2."""
    width, padding = (2, 0) if config.downsample == "unshuffle" else (4, 1)
    if config.is_sequence:
        return nn.Conv2d(dim_in, dim_out, (1, width), (1, 2), (0, padding))
    return nn.Conv2d(dim_in, dim_out, width, 2, padding)


def _attention(config: UNetConfig, kind: Attention, dim: int, level: int) -> nn.Module:
    settings: dict[str, Any] = {
        "heads": config.at_level("heads", level),
        "head_dim": config.at_level("head_dim", level),
        "num_memory": config.memory_kv,
        "norm": "layer" if config.has_old_layout else "rms",
    }
    match kind:
        case "none":
            return nn.Identity()
        case "full":
            return FullAttention(dim, **settings)
        case "linear":
            averages = config.has_old_layout and not config.is_sequence
            return LinearAttention(dim, **settings, averages=averages)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
