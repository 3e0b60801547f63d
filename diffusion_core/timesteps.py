"""Which timesteps a sampler visits, and which a training batch draws."""

from typing import Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
Draw = Literal["uniform", "antithetic", "stratified"]
DRAWS: tuple[Draw, ...] = get_args(Draw)


def make_timesteps(
    num_train_timesteps: int, num_steps: int, spacing: Spacing = "trailing"
) -> Int64[Tensor, " num_steps"]:
    """The timesteps of a sampler, descending; one step is [T - 1] for every spacing.

    `leading` visits the last training step only where num_steps is T or 1, `trailing` always.

    Raises:
        ValueError: num_steps outside 1..T, or an unknown spacing.

    Reference: Lin et al. (2305.08891), table 2; rounding is half to even, in integers.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"num_steps must be between 1 and num_train_timesteps = {num_train_timesteps}, "
            f"got {num_steps}. Lower num_steps or train with more timesteps."
        )
    last = num_train_timesteps - 1
    if num_steps == 1 and spacing in SPACINGS:
        return torch.tensor([last])
    match spacing:
        case "leading":
            steps = [k * (num_train_timesteps // num_steps) for k in range(num_steps)][::-1]
        case "trailing":
            steps = [
                _divide_half_to_even(num_train_timesteps * (num_steps - k), num_steps) - 1
                for k in range(num_steps)
            ]
        case "linspace":
            steps = [
                _divide_half_to_even(last * k, num_steps - 1) for k in reversed(range(num_steps))
            ]
        case _:
            raise ValueError(
                f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}. "
                "Choose one of these."
            )
    return torch.tensor(steps)


def draw_timesteps(
    num_train_timesteps: int,
    batch_size: int,
    draw: Draw = "uniform",
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " batch_size"]:
    """Random training timesteps of a batch, each uniform over 0..T-1 on its own.

    `antithetic` pairs t with T-1-t (an odd batch leaves one alone); `stratified` puts one into
    each of batch_size equal parts, in random order, which lowers the variance of the loss.

    Raises:
        ValueError: an unknown draw.

    Reference: antithetic: Song et al., DDIM's public code; stratified: Kingma et al., VDM
        (2107.00630), on its low-discrepancy sampler.
    """
    match draw:
        case "uniform":
            return torch.randint(num_train_timesteps, (batch_size,), generator=generator)
        case "antithetic":
            half = torch.randint(num_train_timesteps, ((batch_size + 1) // 2,), generator=generator)
            return torch.cat([half, num_train_timesteps - 1 - half])[:batch_size]
        case "stratified":
            u = torch.rand((batch_size,), generator=generator, dtype=torch.float64)
            u = (torch.randperm(batch_size, generator=generator) + u) / batch_size
            return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
        case _:
            raise ValueError(
                f"draw must be one of {', '.join(DRAWS)}, got {draw!r}. Choose one of these."
            )


def _divide_half_to_even(numerator: int, denominator: int) -> int:
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))
