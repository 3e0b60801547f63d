"""The randomness of training as functions.

Nothing here has state: all noise follows from (seed, batch, rewinds, group of 16 positions of the
global batch), whatever the number of workers, so that a resumed run continues exactly and a split
one draws the same. Which items are in a batch is in `order.py`.
"""

import hashlib

import torch
from torch import Tensor

from diffusion_core import noise, timesteps
from pipeline.settings import NOISE_GROUP

SEED_BITS = 63


def draw_timesteps(
    key: tuple[int, ...], global_batch_size: int, num_timesteps: int, draw: timesteps.Draw
) -> Tensor:
    """Timesteps of the whole global batch, int64; every rank draws all of them."""
    generator = _generator("timesteps", *key)
    return timesteps.draw_timesteps(num_timesteps, global_batch_size, draw, generator)


def draw_coin(key: tuple[int, ...]) -> bool:
    """Whether this step shows the network its own guess: the same on every rank, or some rank
    would nearly always take the slow branch and all would wait.
    """
    return bool(torch.rand((), generator=_generator("self_condition", *key)) < 0.5)


def draw_flips(key: tuple[int, ...], global_batch_size: int) -> Tensor:
    """Which samples of the global batch are mirrored, bool [global_batch_size]."""
    return torch.rand(global_batch_size, generator=_generator("flips", *key)) < 0.5


def draw_label_drops(key: tuple[int, ...], global_batch_size: int, share: float) -> Tensor:
    """Which samples of the global batch hide their label, bool [global_batch_size]."""
    return torch.rand(global_batch_size, generator=_generator("labels", *key)) < share


def draw_noise(
    key: tuple[int, ...], groups: range, shape: tuple[int, ...], offset: float = 0.0
) -> Tensor:
    """Standard normal noise of these groups of 16 positions of the global batch.

    Args:
        key: seed, global step, number of rewinds.
        groups: numbers of the groups, counted through the global batch.
        shape: of one sample.
        offset: strength of the noise shared by a channel.
    """
    like = torch.empty((NOISE_GROUP, *shape))
    return torch.cat(
        [noise.draw_noise(like, offset, _generator("noise", *key, group)) for group in groups]
    )


def keyed_seed(*key: int | str) -> int:
    """A seed of 63 bits from a key; other keys give independent ones.

    Of these torch's generator on a CPU takes the last 32: one in 4e9 pairs of keys draws the same.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 64 - SEED_BITS


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(keyed_seed(*key))
