"""What is measured between two rows of metrics, on the device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NUM_QUARTERS = 4


class Meter:
    """Losses and norms of gradients; no step waits for a number.

    Args:
        num_timesteps: T of the process; the first quarter has the least noise.
        device: of the losses.
    """

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self._num_timesteps, self._device = num_timesteps, device
        self._last_losses: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets what was taken since the last row, but not the last loss."""
        self._totals = torch.zeros(2, NUM_QUARTERS, dtype=torch.float64, device=self._device)
        self._grad_norms: list[Tensor] = []
        self._num_steps = 0

    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        """Takes the losses of samples, float32 [N], and their timesteps, int64 [N]."""
        quarters = timesteps * NUM_QUARTERS // self._num_timesteps
        is_in = quarters[:, None] == torch.arange(NUM_QUARTERS, device=quarters.device)
        of_sample = torch.stack([losses.detach().double(), torch.ones_like(losses).double()])
        self._totals += of_sample @ is_in.double()

    def add_step(self, losses: Tensor, grad_norm: Tensor | None) -> None:
        """Takes what a step that was done ended with.

        Args:
            losses: of its last samples.
            grad_norm: before clipping; None: the loss scale skipped the step.
        """
        self._num_steps += 1
        if grad_norm is not None:
            self._grad_norms.append(grad_norm.detach())
        self._last_losses = losses.detach()

    @property
    def last_loss(self) -> float | None:
        """Of the last step that was done; None before the first."""
        return None if self._last_losses is None else float(self._last_losses.mean())

    def is_finite(self) -> bool:
        """Whether all losses taken on this rank were."""
        return bool(torch.isfinite(self._totals).all())

    def take(self, world_size: int, seconds: float) -> dict[str, Any]:
        """The means since the last time, over all ranks; `loss_by_noise` from little to much.

        Args:
            world_size: number of ranks, each of which calls this.
            seconds: that this rank took.

        A quarter of the noise levels that no sample fell into has None, and so has the norm where
        all steps were skipped.
        """
        totals, norms, steps = self._totals, self._grad_norms, self._num_steps
        self.restart()
        all_seconds = totals.new_full((1, NUM_QUARTERS), seconds)
        totals = torch.cat([totals, all_seconds])
        if world_size > 1:
            dist.all_reduce(totals)
        sums, counts, (total_s, *_) = totals.tolist()
        return {
            "loss": sum(sums) / sum(counts),
            "loss_by_noise": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
            "grad_norm": float(torch.stack(norms).mean()) if norms else None,
            "num_samples": int(sum(counts)),
            "steps_per_s": steps * world_size / total_s,
        }
