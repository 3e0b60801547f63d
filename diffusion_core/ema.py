"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Averages a network's parameters over training; buffers are copied as they are.

    The decay warms up, `min(decay, (1 + k) / (10 + k))` at update k, so that early samples
    do not show the initial weights.

    Args:
        model: the network to follow. Not a DDP wrapper: pass the module inside it.
        decay: the ceiling of the decay, in [0, 1).

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}. 0.999 is a usual value.")
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average one optimiser step: ema = d ema + (1 - d) weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore  (no public name)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.num_updates += 1

    def load(self, weights: Mapping[str, Tensor], num_updates: int) -> None:
        """Continues from saved averages and the number of updates behind them."""
        self.model.load_state_dict(weights)
        self.num_updates = num_updates
