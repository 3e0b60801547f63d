"""The loss on the validation split: always the same samples, timesteps and noise."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_core import Diffusion
from pipeline.batches import Batch
from pipeline.loader import draw_noise, draw_timesteps
from pipeline.precision import autocast
from pipeline.settings import NOISE_GROUP
from pipeline.shards import Items

NUM_SAMPLES = 512  # at most
NEIGHBOURS = 8  # read together, so that few files of a remote split are fetched


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    diffusion: Diffusion,
    items: Items,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """The mean loss of a network in eval mode; every rank measures a share and gets the whole.

    Args:
        model: the network, usually the moving average, on the device of its parameters.
        diffusion: the process, on the same device.
        items: the validation split.
        seed: of the noise; timesteps are spread evenly.
        dtype: that the network computes in.
        rank: of this process.
        world_size: number of processes.
    """
    chosen = choose_items(len(items), NUM_SAMPLES)
    count = len(chosen)
    num_groups = -(-count // NOISE_GROUP)
    device = next(model.parameters()).device
    key = (seed, -1, 0)  # a number that no batch has
    timesteps = draw_timesteps(key, count, diffusion.num_train_timesteps, "stratified")
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for group in range(rank * num_groups // world_size, (rank + 1) * num_groups // world_size):
        places = np.arange(group * NOISE_GROUP, min(count, (group + 1) * NOISE_GROUP))
        ids = chosen[places]
        noise = draw_noise(key, range(group, group + 1), items.shape, diffusion.offset_noise)
        batch = Batch(
            items=torch.from_numpy(items.gather(ids)),
            timesteps=timesteps[places],
            noise=noise[: len(ids)],
            class_labels=_labels(diffusion, items, ids),
            self_condition=False if diffusion.self_condition else None,
        )
        with autocast(dtype, device):
            losses = loss_of(batch.to(device), model, diffusion)
        total += losses.double().sum()
    if world_size > 1:
        dist.all_reduce(total)
    return float(total) / count


def choose_items(num_items: int, at_most: int) -> np.ndarray:
    """The ids, ascending, of so many items of a split: groups of neighbours, spread over all of it.

    The first ones would often be of one class: a split keeps the order of its input.
    """
    places = np.arange(min(num_items, at_most))
    groups = places // NEIGHBOURS
    left_out = num_items - len(places)
    return places + groups * left_out // max(1, groups.max(initial=0))


def loss_of(batch: Batch, model: nn.Module, diffusion: Diffusion) -> Tensor:
    """The loss of each sample of a batch, float32 [N]; gradients flow.

    Of values that are fit by how a batch is made, so no GPU is waited for.
    """
    return diffusion.loss_per_sample(
        model,
        batch.x_start(),
        t=batch.timesteps,
        noise=batch.noise,
        self_condition=batch.self_condition,
        class_labels=batch.class_labels,
        check_values=False,
    )


def _labels(diffusion: Diffusion, items: Items, ids: np.ndarray) -> Tensor | None:
    if diffusion.null_label is None:
        return None
    labels = torch.from_numpy(items.labels_of(ids))
    return labels.masked_fill(labels < 0, diffusion.null_label)
