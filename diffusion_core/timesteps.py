"""Which timesteps a sampler visits."""

from typing import Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


def make_timesteps(
    num_train_timesteps: int, num_steps: int, spacing: Spacing = "trailing"
) -> Int64[Tensor, " num_steps"]:
    """The timesteps of a sampler, descending; one step is [T - 1] for every spacing.

    `leading` never visits the last training step, `trailing` always does.

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


def _divide_half_to_even(numerator: int, denominator: int) -> int:
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))
