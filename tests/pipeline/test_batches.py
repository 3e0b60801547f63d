from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_core import Diffusion, make_schedule
from pipeline.batches import Batch, BatchMaker, batch_numbers, iter_ahead, iter_batches
from pipeline.dataset import open_split
from pipeline.order import make_order
from pipeline.settings import TrainConfig
from pipeline.shards import Items, ShardUse
from pipeline.storage import LocalStorage

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def items(tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]) -> Items:
    """Fifty images, each of one colour that tells which it is, brighter at the right."""
    storage = LocalStorage(str(tmp_path))
    pixels = np.tile(np.arange(50, dtype=np.uint8)[:, None, None, None], (1, 1, 4, 4))
    pixels[..., -1] += 100
    labels = [k % 3 for k in range(50)]
    return open_split(storage, write_data_set(storage, pixels, labels), "train")


def maker(items: Items, rank: int = 0, world_size: int = 1, **settings: Any) -> BatchMaker:
    config = TrainConfig(global_batch_size=64, **settings)
    diffusion = Diffusion(make_schedule("cosine", 100), null_label=3)
    order = make_order(
        seed=config.seed, counts=items.counts, global_batch_size=64, shuffle_window=None
    )
    return BatchMaker(config, diffusion, items, order, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_batch(items: Items, world_size: int) -> None:
    whole = maker(items).make(7, 0)
    shares = [maker(items, rank, world_size).make(7, 0) for rank in range(world_size)]
    for name in ("items", "timesteps", "noise", "class_labels"):
        assert torch.equal(torch.cat([getattr(b, name) for b in shares]), getattr(whole, name))
    parts = whole.split(5)
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert all(len(part) for part in parts)


def test_another_batch_or_rewind_is_another(items: Items) -> None:
    here = maker(items)
    batch, later, again = here.make(3, 0), here.make(4, 0), here.make(3, 1)
    assert not torch.equal(batch.items, later.items)
    assert torch.equal(batch.items, again.items)
    for other in (later, again):
        assert not torch.equal(batch.noise, other.noise)
        assert not torch.equal(batch.timesteps, other.timesteps)


def test_half_of_the_images_are_mirrored(items: Items) -> None:
    plain = torch.cat([maker(items).make(k, 0).items for k in range(20)])
    mirrored = torch.cat([maker(items, horizontal_flip=True).make(k, 0).items for k in range(20)])
    is_mirrored = (mirrored == plain.flip(-1)).all(dim=(1, 2, 3))
    is_plain = (mirrored == plain).all(dim=(1, 2, 3))
    assert bool((is_mirrored ^ is_plain).all())
    assert 0.4 < float(is_mirrored.float().mean()) < 0.6


def test_labels_go_with_their_images_and_some_are_hidden(items: Items) -> None:
    batches = [maker(items, label_dropout=0.2).make(k, 0) for k in range(40)]
    labels = torch.cat([b.class_labels for b in batches if b.class_labels is not None])
    expected = torch.cat([b.items[:, 0, 0, 0] for b in batches]) % 3
    is_hidden = labels == 3
    assert torch.equal(labels[~is_hidden], expected[~is_hidden].long())
    assert 0.15 < float(is_hidden.float().mean()) < 0.25


def test_images_become_minus_one_to_one_and_sequences_stay() -> None:
    pixels = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    batch = Batch(pixels, torch.zeros(1), torch.zeros(1), None, None)
    assert batch.x_start().tolist() == [[[[-1.0, 1.0]]]]
    sequence = torch.randn(1, 2, 4)
    assert Batch(sequence, torch.zeros(1), torch.zeros(1), None, None).x_start() is sequence


def test_skipped_batches_are_left_out_and_the_others_stay_in_order() -> None:
    assert list(batch_numbers(0, 5, [1, 3])) == [0, 2, 4, 5, 6]
    assert list(batch_numbers(2, 5, [1, 3])) == [4, 5, 6]
    assert list(batch_numbers(5, 5, [])) == []


def test_what_is_made_ahead_comes_in_order_and_its_errors_too() -> None:
    made = []

    def make(number: int) -> int:
        made.append(number)
        if number == 5:
            raise ValueError("five")
        return number

    ahead = iter_ahead(make, range(10))
    assert next(ahead) == 0
    assert [next(ahead) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(ahead)
    assert made[:6] == list(range(6))


class Recorder:
    """Items of one shard that record what they are told of the future."""

    shape = (1, 2, 2)
    counts = (100,)

    def __init__(self) -> None:
        self.told: list[list[ShardUse]] = []

    def __len__(self) -> int:
        return 100

    def gather(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros((len(ids), *self.shape), np.uint8)

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros(len(ids), np.int64)

    def prefetch(self, uses: Iterable[ShardUse]) -> None:
        self.told.append(list(uses))

    def close(self) -> None: ...


@pytest.mark.parametrize("for_gpu", [False, pytest.param(True, marks=needs_cuda)])
def test_the_reader_is_told_what_comes_again_behind_what_is_skipped(for_gpu: bool) -> None:
    items = Recorder()
    order = make_order(seed=0, counts=items.counts, global_batch_size=64, shuffle_window=64)
    config = TrainConfig(global_batch_size=64, num_steps=6)
    here = BatchMaker(config, Diffusion(make_schedule("cosine", 100)), items, order)
    found = iter_batches(here, 1, skipped=[0, 4], for_gpu=for_gpu)
    assert [number for number, _ in found] == [2, 3, 5, 6, 7]
    assert len(items.told) == 2
    for told, first in zip(items.told, (2, 5), strict=True):
        assert told == list(order.upcoming_shards(first, here.groups, 8 - first))


def test_what_is_drawn_for_a_batch_is_drawn_anew_for_another_and_by_another_seed(
    items: Items,
) -> None:
    def drawn(batch: int, seed: int = 0) -> list[torch.Tensor]:
        settings = {"seed": seed, "label_dropout": 0.5}
        plain = maker(items, **settings).make(batch, 0)
        mirrored = maker(items, **settings, horizontal_flip=True).make(batch, 0)
        assert plain.class_labels is not None
        is_mirrored = (plain.items != mirrored.items).flatten(1).any(1)
        return [plain.noise, plain.timesteps, plain.class_labels == 3, is_mirrored]

    first = drawn(3)
    for other in (drawn(4), drawn(3, seed=1)):
        assert not any(map(torch.equal, first, other))


def test_the_settings_of_the_process_and_of_training_count(items: Items) -> None:
    plain = maker(items)
    diffusion = Diffusion(make_schedule("cosine", 100), offset_noise=1.0, self_condition=True)
    config = plain.config.model_copy(update={"timestep_draw": "antithetic"})
    other = replace(plain, diffusion=diffusion, config=config)
    shared = other.make(3, 0).noise - plain.make(3, 0).noise
    assert torch.allclose(shared, shared[..., :1, :1].expand_as(shared), atol=1e-6)
    assert float(shared.std()) > 0.5
    timesteps = other.make(3, 0).timesteps
    assert (timesteps[:32] + timesteps[32:]).tolist() == [99] * 32
    assert {other.make(k, 0).self_condition for k in range(20)} == {False, True}
    assert plain.make(3, 0).self_condition is None


def test_items_without_a_label_have_the_null_label(
    tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> None:
    storage, pixels = LocalStorage(str(tmp_path)), np.zeros((50, 1, 4, 4), np.uint8)
    labels = [None if k % 2 else 1 for k in range(50)]
    unlabelled = open_split(storage, write_data_set(storage, pixels, labels), "train")
    batch = maker(unlabelled, label_dropout=0.0).make(0, 0)
    assert batch.class_labels is not None
    assert set(batch.class_labels.tolist()) == {1, 3}
