"""Both attentions against their equations written out, with memory and without."""

import pytest
import torch
from torch import Tensor

from diffusion_core import attention
from diffusion_core.attention import FullAttention, LinearAttention

HEADS, HEAD_DIM, DIM = 2, 4, 6


def written_out(layer: FullAttention | LinearAttention, x: Tensor) -> Tensor:
    tokens = layer.norm(x).flatten(2).mT
    weights = layer.to_qkv.weight.flatten(1).chunk(3)
    q, k, v = ((tokens @ w.T).unflatten(2, (HEADS, HEAD_DIM)) for w in weights)
    if layer.memory is not None:
        memory = layer.memory.movedim(1, 2)[:, None].expand(-1, len(x), -1, -1, -1)
        k, v = torch.cat([memory[0], k], 1), torch.cat([memory[1], v], 1)
    if isinstance(layer, FullAttention):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    else:
        v = v / tokens.shape[1] if layer.averages else v
        context = torch.einsum("bjhd,bjhe->bhde", k.softmax(1), v)
        out = torch.einsum("bhde,bihd->bihe", context, q.softmax(-1) * HEAD_DIM**-0.5)
    bias = layer.to_out.bias
    assert bias is not None
    out = out.flatten(2) @ layer.to_out.weight.flatten(1).T + bias
    out = out.mT.unflatten(2, x.shape[2:])
    return x + (out if isinstance(layer, FullAttention) else layer.norm_out(out))


def make_layers() -> list[FullAttention | LinearAttention]:
    torch.manual_seed(0)
    layers: list[FullAttention | LinearAttention] = [
        kind(DIM, HEADS, HEAD_DIM, memory)
        for kind in (FullAttention, LinearAttention)
        for memory in (0, 3)
    ]
    layers.append(LinearAttention(DIM, HEADS, HEAD_DIM, averages=True))
    return layers


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("size", [(4, 6), (1, 5)])
def test_equals_its_equation_with_gradients(case: int, size: tuple[int, int]) -> None:
    layer = make_layers()[case].double()
    x = torch.randn(3, DIM, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    got, expected = layer(x), written_out(layer, x)
    assert torch.allclose(got, expected, atol=1e-10)
    inputs = [x, *layer.parameters()]
    pairs = zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    for mine, theirs in pairs:
        assert torch.allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize("num_memory", [0, 3])
def test_a_few_images_at_a_time_give_the_same(
    num_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LinearAttention(DIM, HEADS, HEAD_DIM, num_memory).double()
    x = torch.randn(5, DIM, 4, 4, dtype=torch.float64)
    x.requires_grad_()
    inputs, weights = [x, *layer.parameters()], torch.randn_like(x)
    whole = layer(x)
    gradients = torch.autograd.grad((whole * weights).sum(), inputs)
    monkeypatch.setattr(attention, "CACHED", 2 * 16 * HEADS * HEAD_DIM)
    pieces = layer(x)
    assert torch.allclose(pieces, whole, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad((pieces * weights).sum(), inputs), gradients, strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-10)
    with torch.inference_mode():
        assert torch.allclose(layer(x), whole, atol=1e-12)


def test_large_keys_do_not_overflow() -> None:
    layer = LinearAttention(DIM, HEADS, HEAD_DIM, 3)
    torch.nn.init.constant_(layer.to_qkv.weight, 200.0)
    assert bool(torch.isfinite(layer(torch.randn(2, DIM, 4, 4))).all())


def test_float16_has_the_gradient_of_many_pixels() -> None:
    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        layer = LinearAttention(16, HEADS, 16)
        x = (torch.randn(1, 16, 128, 128) + 0.5).to(dtype)
        weights = torch.randn(1, 16, 128, 128) / 64  # as under a scaled loss
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            out = layer(x)
        (out.float() * weights).sum().backward()
        assert layer.to_qkv.weight.grad is not None
        return layer.to_qkv.weight.grad.chunk(3)

    for half, exact in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert (half - exact).norm() < 0.02 * exact.norm()
