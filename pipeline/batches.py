"""What a rank trains on at each step, as a function of the config and the number of the batch.

Nothing here has state: a batch made again is the same, on whichever rank and however often.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion_core import Diffusion
from pipeline.errors import ConfigError
from pipeline.loader import (
    draw_coin,
    draw_flips,
    draw_label_drops,
    draw_noise,
    draw_timesteps,
)
from pipeline.order import Order
from pipeline.settings import NOISE_GROUP, TrainConfig
from pipeline.shards import Items

T = TypeVar("T")

AHEAD = 2  # batches made before they are needed


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, or a part of it."""

    items: Tensor  # uint8 [N, C, H, W], or float32 [N, C, L]
    timesteps: Tensor  # int64 [N]
    noise: Tensor  # float32, as items
    class_labels: Tensor | None  # int64 [N], the null label where there is none to be seen
    self_condition: bool | None

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device) -> "Batch":
        """On a device, sent without waiting where the memory is pinned."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a GPU fetches it while it computes."""
        return self._map(Tensor.pin_memory)

    def split(self, parts: int) -> list["Batch"]:
        """So many parts, as equal as can be and none empty."""
        ends = np.linspace(0, len(self), min(parts, len(self)) + 1).round().astype(int).tolist()
        return [self._map(lambda value, a=a, b=b: value[a:b]) for a, b in pairwise(ends)]

    def x_start(self) -> Tensor:
        """The clean data: images in [-1, 1], sequences as they are."""
        if self.items.dtype != torch.uint8:
            return self.items
        images = self.items.float().div_(127.5).sub_(1)
        return images.contiguous(memory_format=torch.channels_last)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        labels = self.class_labels
        return replace(
            self,
            items=change(self.items),
            timesteps=change(self.timesteps),
            noise=change(self.noise),
            class_labels=None if labels is None else change(labels),
        )


def check_ranks(config: TrainConfig, world_size: int) -> None:
    """Refuses more ranks than can share a batch.

    Raises:
        ConfigError: a rank would have nothing to do.
    """
    num_groups = config.global_batch_size // NOISE_GROUP
    if world_size > num_groups:
        raise ConfigError(
            f"{world_size} ranks cannot share train.global_batch_size = "
            f"{config.global_batch_size}: each takes {NOISE_GROUP} or more. Start at most "
            f"{num_groups}, or raise it to {NOISE_GROUP * world_size}."
        )


@dataclass(frozen=True)
class BatchMaker:
    """Makes a rank's share of any global batch.

    Args:
        config: the training settings.
        diffusion: the process; its null label stands for none.
        items: the training split.
        order: of its items.
        rank: of this process.
        world_size: number of processes.
    """

    config: TrainConfig
    diffusion: Diffusion
    items: Items
    order: Order
    rank: int = 0
    world_size: int = 1

    @property
    def groups(self) -> range:
        """The groups of 16 positions of a global batch that are this rank's."""
        number = self.config.global_batch_size // NOISE_GROUP
        return range(
            self.rank * number // self.world_size, (self.rank + 1) * number // self.world_size
        )

    def make(self, batch: int, num_rewinds: int) -> Batch:
        """This rank's share of a global batch.

        Args:
            batch: its number; it says which samples.
            num_rewinds: so far; with the number it says which noise.
        """
        config, size = self.config, self.config.global_batch_size
        here = slice(self.groups.start * NOISE_GROUP, self.groups.stop * NOISE_GROUP)
        ids = self.order.ids(batch, self.groups)
        key = (config.seed, batch, num_rewinds)
        items = torch.from_numpy(self.items.gather(ids))
        if config.horizontal_flip:
            flips = draw_flips(key, size)[here]
            items[flips] = items[flips].flip(-1)
        draw, num_timesteps = config.timestep_draw, self.diffusion.num_train_timesteps
        return Batch(
            items=items,
            timesteps=draw_timesteps(key, size, num_timesteps, draw)[here],
            noise=draw_noise(key, self.groups, tuple(items.shape[1:]), self.diffusion.offset_noise),
            class_labels=self._labels(ids, key, here),
            self_condition=draw_coin(key) if self.diffusion.self_condition else None,
        )

    def _labels(self, ids: np.ndarray, key: tuple[int, ...], here: slice) -> Tensor | None:
        null_label = self.diffusion.null_label
        if null_label is None:
            return None
        labels = torch.from_numpy(self.items.labels_of(ids))
        labels = labels.masked_fill(labels < 0, null_label)
        drops = draw_label_drops(key, self.config.global_batch_size, self.config.label_dropout)
        return self.diffusion.drop_labels(labels, drops[here])


def iter_batches(
    maker: BatchMaker,
    first_step: int,
    *,
    skipped: Sequence[int] = (),
    num_rewinds: int = 0,
    for_gpu: bool = False,
) -> Generator[tuple[int, Batch], None, None]:
    """A rank's batches from a step to the end of training, with their numbers.

    Args:
        maker: of this rank.
        first_step: the step of the first batch, from 0.
        skipped: numbers of batches that are left out.
        num_rewinds: so far.
        for_gpu: made ahead of need and in page-locked memory. On a CPU a thread would only take
            from the network what it gives.
    """
    num_steps = maker.config.num_steps
    planned = -1  # the batch that the reader was told comes next

    def make(number: int) -> tuple[int, Batch]:
        nonlocal planned
        if number != planned:  # at the start, and behind what is skipped
            ahead = num_steps + len(skipped) - number
            maker.items.prefetch(maker.order.upcoming_shards(number, maker.groups, ahead))
        planned = number + 1
        batch = maker.make(number, num_rewinds)
        return number, batch.pinned() if for_gpu else batch

    numbers = batch_numbers(first_step, num_steps, skipped)
    yield from iter_ahead(make, numbers) if for_gpu else map(make, numbers)


def batch_numbers(first_step: int, num_steps: int, skipped: Sequence[int]) -> Iterator[int]:
    """The number of the batch of each step from `first_step` on: all in order, but the skipped."""
    left_out = set(skipped)
    step = 0
    for number in count():
        if step == num_steps:
            return
        if number in left_out:
            continue
        if step >= first_step:
            yield number
        step += 1


def iter_ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Generator[T, None, None]:
    """`make` of each number, on a thread of its own and some ahead of need."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for number in numbers:
                pending.append(pool.submit(make, number))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
