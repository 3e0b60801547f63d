"""Attention over the pixels of an image: softmax attention, and the linear kind.

Both take x and give x plus what was attended. Memory keys and values are learned tokens that
every pixel can attend to besides the pixels.
"""

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion_core.norms import Norm, NormKind

CACHED = 1 << 19  # queries that fit into a processor's cache together with their keys
SHORT = 64  # pixels, below which scaled_dot_product_attention is the slower one on CPUs
Triple = tuple[Tensor, Tensor, Tensor]


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
        if x.device.type == "cpu" and q.shape[2] <= SHORT:
            out = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        else:
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
        tokens = _tokens(self.norm(x)).contiguous()
        # Sums over all pixels, and the squares of their inverses, leave the range of float16.
        wide = tokens.float() if tokens.dtype == torch.float16 else tokens
        with torch.autocast(x.device.type, enabled=False):  # one type for all of what follows
            attended = self._attend(wide).to(tokens.dtype)
        return self.norm_out(_image(attended, x), residual=x, overwrite=True)

    def _attend(self, tokens: Float[Tensor, "batch token channel"]) -> Tensor:
        weights = (self.to_qkv.weight, self.to_out.weight, self.to_out.bias, self.memory)
        qkv, to_out, bias, memory = (w if w is None else w.to(tokens.dtype) for w in weights)
        to_q, to_k, to_v = cast("Tensor", qkv).permute(0, 2, 3, 1).flatten(1).chunk(3)
        to_out = cast("Tensor", to_out).flatten(1).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        keep = torch.is_grad_enabled()
        values = to_v.unflatten(0, (self.heads, -1)).mT  # [head, channel, head_dim]
        memory_keys = least = None
        if memory is not None:
            values = torch.cat([values, memory[1]], dim=1)
            memory_keys = memory[0].transpose(0, 1).flatten(1)  # [memory, head x head_dim]
            least = memory_keys.detach().amax(0)

        context, total, largest = cast("Triple", _SummariseKeys.apply(tokens, to_k, least, keep))
        if memory_keys is not None:
            keys = (memory_keys - largest).exp()
            context = torch.cat([context, keys.mT], dim=2)
            total = total + keys.sum(1)
        scale = self.scale / tokens.shape[1] if self.averages else self.scale
        context = context * (scale / total)[..., None]
        # One product for each head, of all images at once.
        context = context.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(1, 2)
        matrix = torch.bmm(context, values @ to_out).unflatten(1, (len(tokens), -1))
        matrix = matrix.transpose(0, 1).flatten(1, 2)
        return cast("Tensor", _ApplyQueries.apply(tokens, to_q, matrix, bias, self.heads, keep))


class _SummariseKeys(torch.autograd.Function):
    """context = e^T x and total = the sum of e over pixels, e = exp(x to_k^T - largest).

    largest, the maximum over pixels and memory, keeps e finite and has no gradient: it cancels
    in context / total.
    """

    @staticmethod
    def forward(ctx, tokens, to_k, least, keep):
        es, found = [], []
        for x in tokens.split(_num_images(tokens, to_k)):
            k = _project(x, to_k)
            largest = k.amax(1, keepdim=True)
            largest = largest if least is None else torch.maximum(largest, least)
            e = k.sub_(largest).exp_()
            found.append((torch.bmm(e.mT, x), e.sum(1), largest))
            if keep:  # or the next images can use the same memory
                es.append(e)
        context, total, largest = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(tokens, to_k, *es)
        ctx.mark_non_differentiable(largest)
        return context, total, largest

    @staticmethod
    @once_differentiable
    def backward(ctx, d_context, d_total, _):
        tokens, to_k, *es = ctx.saved_tensors
        d_tokens, d_to_k = torch.empty_like(tokens), torch.zeros_like(to_k)
        size, buffer = len(es[0]), torch.empty_like(es[0])
        wholes = (tokens, d_tokens, d_context, d_total)
        for e, x, d_x, d_c, d_t in zip(es, *(w.split(size) for w in wholes), strict=True):
            d_k = torch.baddbmm(d_t[:, None], x, d_c.mT, out=buffer[: len(x)]).mul_(e)
            torch.bmm(e, d_c, out=d_x)
            _add_projection(x, d_x, to_k, d_to_k, d_k)
        return d_tokens, d_to_k, None, None


class _ApplyQueries(torch.autograd.Function):
    """out = q matrix + bias, q the softmax of x to_q^T over each head's channels."""

    @staticmethod
    def forward(ctx, tokens, to_q, matrix, bias, heads, keep):
        size, out = _num_images(tokens, to_q), torch.empty_like(tokens)
        qs = []
        for x, m, o in zip(*(w.split(size) for w in (tokens, matrix, out)), strict=True):
            q = _project(x, to_q).unflatten(-1, (heads, -1)).softmax(-1).flatten(2)
            torch.baddbmm(bias, q, m, out=o)
            if keep:
                qs.append(q)
        ctx.heads = heads
        ctx.save_for_backward(tokens, to_q, matrix, *qs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        tokens, to_q, matrix, *qs = ctx.saved_tensors
        d_tokens, d_to_q = torch.zeros_like(tokens), torch.zeros_like(to_q)
        d_matrix = torch.empty_like(matrix)
        size, buffer = len(qs[0]), torch.empty_like(qs[0])
        wholes = (tokens, d_tokens, matrix, d_matrix, d_out)
        for q, x, d_x, m, d_m, d_o in zip(qs, *(w.split(size) for w in wholes), strict=True):
            torch.bmm(q.mT, d_o, out=d_m)
            d_q = torch.bmm(d_o, m.mT, out=buffer[: len(x)]).unflatten(-1, (ctx.heads, -1))
            by_head = q.unflatten(-1, (ctx.heads, -1))
            d_q = torch.ops.aten._softmax_backward_data(d_q, by_head, -1, q.dtype)
            _add_projection(x, d_x, to_q, d_to_q, d_q.flatten(2))
        return d_tokens, d_to_q, d_matrix, d_out.sum((0, 1)), None, None


def _add_projection(x: Tensor, d_x: Tensor, weight: Tensor, d_weight: Tensor, grad: Tensor) -> None:
    """Adds to d_x and d_weight the gradients of x weight^T."""
    grad = grad.flatten(0, 1)
    d_x.flatten(0, 1).addmm_(grad, weight)
    d_weight.addmm_(grad.mT, x.flatten(0, 1))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T as a convolution, which CPUs do faster than a product this narrow."""
    return F.conv2d(x.mT[:, :, None], weight[:, :, None, None])[:, :, 0].mT


def _num_images(tokens: Tensor, weight: Tensor) -> int:
    """How many images to take at a time."""
    if tokens.device.type != "cpu":
        return len(tokens)
    return max(1, CACHED // (tokens.shape[1] * len(weight)))


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
