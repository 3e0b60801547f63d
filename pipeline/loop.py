"""The training loop. It knows no Ray: a rank, a process group, images, and callbacks.

Ray Train (`train.py`), a single process and `torchrun` are adapters around it.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion_core import EMA, Diffusion
from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.loader import (
    batch_positions,
    draw_coin,
    draw_noise,
    draw_timesteps,
    keyed_seed,
    sample_ids,
)
from pipeline.settings import NOISE_GROUP, TrainConfig
from pipeline.shards import ArrowItems

LARGEST_HEAP_BLOCK = (32 << 20) - (64 << 10)  # bytes: just below glibc's limit
LOG_EVERY = 20  # optimiser steps: how often ranks agree on the loss and progress is told


@dataclass(frozen=True)
class Progress:
    """What rank 0 tells while training."""

    global_step: int
    num_steps: int
    loss: float
    images_per_s: float
    seconds_left: float
    resumed_from: int


def train_loop(
    config: TrainConfig,
    model: nn.Module,
    diffusion: Diffusion,
    images: ArrowItems,
    store: CheckpointStore,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[dict[str, float]]:
    """Trains up to `config.num_steps`, from the latest checkpoint there is before it.

    Every rank calls it with the same arguments but its rank; with more than one, the default
    process group must be up. The same config gives the same result, uninterrupted or resumed.

    Args:
        config: the training settings.
        model: the network, on the CPU; the loop moves it.
        diffusion: the process.
        images: the training split.
        store: where checkpoints go; rank 0 writes.
        rank: of this process.
        world_size: number of processes.
        device: to train on; the CPU when not given.
        on_progress: called on rank 0 about every 20 steps.

    Returns:
        The loss history: `global_step`, `loss` and `images_seen`, one entry for 20 steps.
    """
    device = device or torch.device("cpu")
    keep_freed_memory()
    model = model.to(device)
    diffusion = diffusion.to(device)
    ema = EMA(model, config.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    first_step, history = _resume(config, model, ema, optimizer, store, rank, world_size)
    replica = (
        DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    )
    replica.train()
    losses: list[Tensor] = []
    clock = _Clock(first_step)
    for step in range(first_step, config.num_steps):
        torch.manual_seed(keyed_seed("dropout", config.seed, step, rank))
        x_start, t, noise = _batch(config, diffusion, images, step, rank, world_size, device)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        optimizer.zero_grad(set_to_none=True)
        coin = draw_coin((config.seed, step, 0)) if diffusion.self_condition else None
        loss = diffusion.loss(replica, x_start, t=t, noise=noise, self_condition=coin)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        ema.update(model)
        losses.append(loss.detach())

        done = step + 1
        saves = done % config.checkpoint_every == 0 or done == config.num_steps
        if saves or done % LOG_EVERY == 0 or done == first_step + 1:
            mean = _mean_over_ranks(losses, world_size)
            if rank == 0:
                on_progress(clock.progress(done, config, mean))
            # A checkpoint closes an entry, so that a resumed history goes on alike.
            if saves or done % LOG_EVERY == 0:
                images_seen = done * config.global_batch_size
                history.append({"global_step": done, "loss": mean, "images_seen": images_seen})
                losses.clear()
        if saves and rank == 0:
            store.save(
                Checkpoint(
                    global_step=done,
                    model=model.state_dict(),
                    ema=ema.model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    history=history,
                )
            )
    return history


class _Clock:
    """Rates and the time left, from the wall time of this process's own steps."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.started = time.monotonic()

    def progress(self, done: int, config: TrainConfig, loss: float) -> Progress:
        seconds_per_step = (time.monotonic() - self.started) / (done - self.first_step)
        return Progress(
            global_step=done,
            num_steps=config.num_steps,
            loss=loss,
            images_per_s=config.global_batch_size / seconds_per_step,
            seconds_left=(config.num_steps - done) * seconds_per_step,
            resumed_from=self.first_step,
        )


def _batch(
    config: TrainConfig,
    diffusion: Diffusion,
    images: ArrowItems,
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's x_start in [-1, 1], timesteps and noise of a step."""
    positions = batch_positions(step, config.global_batch_size, rank, world_size)
    pixels = torch.from_numpy(images.gather(sample_ids(config.seed, positions, len(images))))
    key = (config.seed, step, 0)
    share = config.global_batch_size // world_size
    timesteps = draw_timesteps(
        key, config.global_batch_size, diffusion.num_train_timesteps, config.timestep_draw
    )
    groups = range(rank * share // NOISE_GROUP, (rank + 1) * share // NOISE_GROUP)
    noise = draw_noise(key, groups, tuple(pixels.shape[1:]), diffusion.offset_noise)
    # uint8 until the device: bytes are what travels. Sequences are float32 and used as they are.
    x_start = pixels.to(device)
    if x_start.dtype == torch.uint8:
        x_start = x_start.float().div_(127.5).sub_(1)
        x_start = x_start.contiguous(memory_format=torch.channels_last)
    return x_start, timesteps[rank * share : (rank + 1) * share].to(device), noise.to(device)


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant; counted in optimiser steps."""
    return config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))


def _mean_over_ranks(losses: list[Tensor], world_size: int) -> float:
    mean = torch.stack(losses).mean()
    if world_size > 1:
        dist.all_reduce(mean)
        mean /= world_size
    return float(mean)


def _resume(
    config: TrainConfig,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    store: CheckpointStore,
    rank: int,
    world_size: int,
) -> tuple[int, list[dict[str, float]]]:
    """Loads the latest checkpoint on every rank; rank 0 says which, so that all agree."""
    checkpoint = store.load_latest(config.num_steps) if rank == 0 else None
    if world_size > 1:
        chosen = [checkpoint.global_step if checkpoint else -1]
        dist.broadcast_object_list(chosen, src=0)
        if rank != 0 and chosen[0] >= 0:
            checkpoint = store.load(chosen[0])
            if checkpoint is None:
                raise RuntimeError(f"Rank {rank} cannot read checkpoint {chosen[0]}.")
    if checkpoint is None:
        return 0, []
    model.load_state_dict(checkpoint.model)
    ema.load(checkpoint.ema, checkpoint.global_step)
    optimizer.load_state_dict(checkpoint.optimizer)
    return checkpoint.global_step, list(checkpoint.history)


def keep_freed_memory() -> None:
    """Makes glibc keep this process's freed memory for the next step.

    It gives memory back to the system above twice the largest block that was ever freed, up to
    blocks of 32 MiB; small networks free none so large, and each step faults its memory in anew,
    which took a fifth of the time. With another allocator this does nothing.
    """
    block = torch.empty(LARGEST_HEAP_BLOCK, dtype=torch.uint8)
    del block


@contextlib.contextmanager
def torch_threads(count: int) -> Any:
    """Uses this many CPU threads inside the block: processes that share cores must not fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
