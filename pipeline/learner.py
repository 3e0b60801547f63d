"""What an optimiser step changes: the network, its moving average and the optimiser's state."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_core import EMA, Diffusion
from pipeline.batches import Batch
from pipeline.checkpoints import Checkpoint
from pipeline.host import gpu_memory_told
from pipeline.meter import Meter
from pipeline.precision import NAMES, autocast, choose_dtype
from pipeline.replica import Replica
from pipeline.settings import TrainConfig
from pipeline.stopwatch import Stopwatch
from pipeline.validation import loss_of

FOR_MEMORY = (
    "Raise train.accumulation_steps, which takes the same steps in smaller parts, or lower "
    "train.global_batch_size, and see that nothing else uses the GPU."
)


class Learner:
    """One rank's network with all that trains it.

    Args:
        config: the training settings.
        model: the network, on the CPU; it is moved.
        diffusion: the process, on the device.
        device: to train on.
        world_size: number of ranks, whose gradients are averaged.
        watch: told how long a backward pass waited for other ranks.

    Raises:
        ConfigError: the device does not have `config.precision`.
        ClusterError: of its methods: a GPU has too little memory.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        diffusion: Diffusion,
        device: torch.device,
        world_size: int,
        watch: Stopwatch,
    ) -> None:
        self.config, self.diffusion = config, diffusion
        self.device, self.world_size = device, world_size
        self.dtype = choose_dtype(config, device)
        self.model = model.to(device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scaler = self._make_scaler()
        self.replica = Replica(self.model, world_size, watch)

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What the bits of a step depend on, and the settings need not tell; after `warm_up`."""
        return {
            "precision": NAMES[self.dtype],
            "compiled": self.replica.is_compiled,
            "accumulation_steps": self.config.accumulation_steps,
        }

    @property
    def needs_warm_up(self) -> bool:
        """Whether the first backward pass would be unlike all others."""
        return self.config.compile or self.world_size > 1

    @gpu_memory_told(FOR_MEMORY)
    def warm_up(self, batch: Batch) -> None:
        """A step that changes nothing.

        DDP lays the gradients out anew after its first backward pass, by the order in which they
        came; with three ranks and more the layout changes in what order they are summed. So every
        process leaves that pass behind before it trains, also one that resumes.

        With torch.compile each rank first goes alone through all that a step may be, so that what
        cannot be compiled is found here, where nobody waits for the one that fails.

        Args:
            batch: a share of a global batch; which samples are in it does not matter.
        """
        parts = batch.split(self.config.accumulation_steps)

        def rehearse() -> None:
            with self.replica.synchronised(False):
                for coin in (False, True) if batch.self_condition is not None else (False,):
                    self._go_through(parts, is_self_conditioned=coin)

        if self.config.compile:
            self.replica.compile(rehearse)
        if self.world_size > 1:
            self._go_through(parts[-1:], is_self_conditioned=False)

    def _go_through(self, parts: Sequence[Batch], *, is_self_conditioned: bool) -> None:
        """The forward and backward passes of a step, and nothing of what they gave."""
        for k, part in enumerate(parts):
            if part.self_condition is not None:
                part = replace(part, self_condition=is_self_conditioned)
            part = part.to(self.device)
            with self.replica.synchronised(k == len(parts) - 1):
                with autocast(self.dtype, self.device):
                    losses = loss_of(part, self.replica.module, self.diffusion)
                self.replica.backward(losses.sum())
        self.optimizer.zero_grad(set_to_none=True)

    @gpu_memory_told(FOR_MEMORY)
    def learn(self, batch: Batch, step: int, meter: Meter) -> bool:
        """One optimiser step; False if loss or gradient is not finite on any rank: call `restore`.

        One that the loss scale skips is done: it has lowered the scale.

        Args:
            batch: this rank's share of the global batch.
            step: its number, from 0.
            meter: told the losses and the norm of the gradient.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimizer.zero_grad(set_to_none=True)
        is_finite = torch.ones((), dtype=torch.int32, device=self.device)
        parts = batch.split(config.accumulation_steps)
        for k, part in enumerate(parts):
            part = part.to(self.device)
            with self.replica.synchronised(k == len(parts) - 1):
                with autocast(self.dtype, self.device):
                    losses = loss_of(part, self.replica.module, self.diffusion)
                # Ranks' gradients are averaged: this makes it the mean over the global batch,
                # however unequal their shares.
                loss = losses.sum() * (self.world_size / config.global_batch_size)
                self.replica.backward(self.scaler.scale(loss))
            meter.add(losses, part.timesteps)
            is_finite &= torch.isfinite(losses.detach()).all()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        if self.world_size > 1:  # a loss may overflow on one rank whose gradient does not
            dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        has_loss, has_gradient = torch.stack([is_finite.bool(), torch.isfinite(grad_norm)]).tolist()
        self.replica.settle()  # the list has waited for the GPU
        # With fp16 it may be the scale that was too large for the gradient: the scaler then lowers
        # it, and the weights stay as they are. One of 1 is not to blame.
        if not has_loss or not (has_gradient or self.scaler.get_scale() > 1):
            return False
        if has_gradient:
            self.scaler.step(self.optimizer)
            self.ema.update(self.model)
        self.scaler.update()
        meter.add_step(losses, grad_norm if has_gradient else None)
        return True

    @torch.no_grad()
    def is_finite(self) -> Tensor:
        """Whether weights, their average and the moments are: int32 [], on the device."""
        moments = [m for known in self.optimizer.state.values() for m in known.values() if m.ndim]
        held = [*self.model.parameters(), *self.ema.model.parameters(), *moments]
        largest = torch.stack(torch._foreach_norm(held, math.inf))  # pyright: ignore
        return torch.isfinite(largest).all().int()

    def state(self) -> dict[str, Any]:
        """The fields of a `Checkpoint` that are the learner's, not copied."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes them back."""
        optimizer = checkpoint.optimizer["optimizer"]
        self.model.load_state_dict(checkpoint.model)
        # The average moves with the weights, which stand still where the loss scale skips a step:
        # its updates are those that the optimiser counts, not the steps.
        num_updates = max((int(known["step"]) for known in optimizer["state"].values()), default=0)
        self.ema.load(checkpoint.ema, num_updates)
        self.optimizer.load_state_dict(optimizer)
        self.scaler = self._make_scaler()  # the old one may be in the middle of a step
        self.scaler.load_state_dict(checkpoint.optimizer["scaler"])

    def _make_scaler(self) -> torch.amp.GradScaler:
        """Of the loss, where fp16 needs it; otherwise it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def learning_rate(config: TrainConfig, step: int) -> float:
    """That of an optimiser step, counted from 0: linear warm-up, then constant or cosine to 0."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.learning_rate_decay == "constant":
        return config.learning_rate * warm
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
