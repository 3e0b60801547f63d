"""Attention over the pixels of an image: softmax attention, and the linear kind.

Both take x and give x plus what was attended. Memory keys and values are learned tokens that
every pixel can attend to besides the pixels.
"""

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_core.norms import Norm, NormKind

CACHED = 1 << 19  # queries that fit into a processor's cache together with their keys


class FullAttention(nn.Module):
    """Softmax attention over all pixels, with a residual.

    Args:
        dim: channels of the image.
        heads: number of heads.
        head_dim: channels of each.
        num_memory: learned keys and values beside the pixels.
        norm: before the attention.

    Reference: Vaswani et al. (1706.03762), eq. 1.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, num_memory: int = 0, norm: NormKind = "rms"
    ) -> None:
        super().__init__()
        self.heads = heads
        hidden = heads * head_dim
        self.norm = Norm(norm, dim)
        self.to_qkv = nn.Conv2d(dim, hidden * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, 1)
        self.memory = _make_memory(heads, num_memory, head_dim)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        qkv = _tokens(self.to_qkv(self.norm(x)))
        batch = qkv.shape[0]
        qkv = qkv.unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.memory is not None:
            mk, mv = self.memory[:, None].expand(-1, batch, -1, -1, -1).to(k.dtype).unbind(0)
            k, v = torch.cat([mk, k], dim=2), torch.cat([mv, v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(_image(out.transpose(1, 2).flatten(2), x))


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of pixels, with a residual.

    Queries are softmaxed over a head's channels, keys over the pixels, so that keys and values
    meet in a small matrix first. Values and the output projection are linear in that matrix, and
    are applied to it instead of to every pixel: the same result without two of the four
    largest arrays.

    Args:
        dim: channels of the image.
        heads: number of heads.
        head_dim: channels of each.
        num_memory: learned keys and values beside the pixels.
        norm: before the attention and after it.
        averages: divide by the number of pixels, as old networks do.

    Reference: Shen et al., Efficient Attention (1812.01243), section 3, with softmax normalisation.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        num_memory: int = 0,
        norm: NormKind = "rms",
        averages: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.averages = heads, averages
        self.scale = head_dim**-0.5
        hidden = heads * head_dim
        self.norm = Norm(norm, dim)
        self.to_qkv = nn.Conv2d(dim, hidden * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, 1)
        self.norm_out = Norm(norm, dim)
        self.memory = _make_memory(heads, num_memory, head_dim)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        normal = self.norm(x)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            attended = self._attend(normal)
        else:  # a few images at a time, so that queries and keys stay in the processor's cache
            num_images = max(1, CACHED // (x[0, 0].numel() * self.to_out.in_channels))
            attended = torch.cat([self._attend(part) for part in normal.split(num_images)])
        return x + self.norm_out(_image(attended, x))

    def _attend(
        self, normal: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch token channel"]:
        to_q, to_k, to_v = self.to_qkv.weight.chunk(3)
        q = _tokens(F.conv2d(normal, to_q)).unflatten(-1, (self.heads, -1)).softmax(-1).flatten(2)
        k = F.conv2d(normal, to_k)
        # k is softmaxed over pixels and memory; its division is left to the small matrix.
        largest = k.detach().amax((2, 3), keepdim=True)
        if self.memory is not None:
            mk = self.memory[0].transpose(0, 1).flatten(1).to(k.dtype)  # memory, head x head_dim
            largest = torch.maximum(largest, mk.detach().amax(0)[:, None, None])
            mk = (mk - largest.flatten(1)[:, None]).exp_()
        k = _tokens(k.sub_(largest).exp_())
        tokens = _tokens(normal)
        # [batch, head, head_dim, channel]: keys against tokens, then values of that
        context = torch.bmm(k.mT, tokens).unflatten(1, (self.heads, -1))
        context = context @ to_v.flatten(1).unflatten(0, (self.heads, -1)).mT
        total = k.sum(1)
        if self.memory is not None:
            total = total + mk.sum(1)
            mk = mk.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1)
            context = context + mk @ self.memory[1].to(k.dtype)
        scale = self.scale / tokens.shape[1] if self.averages else self.scale
        context = context * (scale / total).unflatten(1, (self.heads, -1))[..., None]
        to_out = self.to_out.weight.flatten(1).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        return torch.bmm(q, (context @ to_out).flatten(1, 2)) + cast("Tensor", self.to_out.bias)


def _make_memory(heads: int, num_memory: int, head_dim: int) -> nn.Parameter | None:
    """Keys and values, [2, head, memory, head_dim]."""
    if not num_memory:
        return None
    return nn.Parameter(torch.randn(2, heads, num_memory, head_dim))


def _tokens(x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch token channel"]:
    """Pixels as rows; no copy where channels are last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Float[Tensor, "batch token channel"], like: Tensor) -> Tensor:
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
