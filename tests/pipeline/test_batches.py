from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_core import Diffusion, make_schedule
from pipeline.batches import Batch, BatchMaker, batch_numbers, iter_ahead
from pipeline.dataset import open_split
from pipeline.settings import TrainConfig
from pipeline.shards import ArrowItems
from pipeline.storage import LocalStorage


@pytest.fixture
def items(tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]) -> ArrowItems:
    """Fifty images, each of one colour that tells which it is, brighter at the right."""
    storage = LocalStorage(str(tmp_path))
    pixels = np.tile(np.arange(50, dtype=np.uint8)[:, None, None, None], (1, 1, 4, 4))
    pixels[..., -1] += 100
    labels = [k % 3 for k in range(50)]
    return open_split(storage, write_data_set(storage, pixels, labels), "train")


def maker(items: ArrowItems, rank: int = 0, world_size: int = 1, **settings: Any) -> BatchMaker:
    config = TrainConfig(global_batch_size=64, **settings)
    diffusion = Diffusion(make_schedule("cosine", 100), null_label=3)
    return BatchMaker(config, diffusion, items, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_batch(items: ArrowItems, world_size: int) -> None:
    whole = maker(items).make(7, 0)
    shares = [maker(items, rank, world_size).make(7, 0) for rank in range(world_size)]
    for name in ("items", "timesteps", "noise", "class_labels"):
        assert torch.equal(torch.cat([getattr(b, name) for b in shares]), getattr(whole, name))
    parts = whole.split(5)
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert all(len(part) for part in parts)


def test_another_batch_or_rewind_is_another(items: ArrowItems) -> None:
    here = maker(items)
    batch, later, again = here.make(3, 0), here.make(4, 0), here.make(3, 1)
    assert not torch.equal(batch.items, later.items)
    assert torch.equal(batch.items, again.items)
    for other in (later, again):
        assert not torch.equal(batch.noise, other.noise)
        assert not torch.equal(batch.timesteps, other.timesteps)


def test_half_of_the_images_are_mirrored(items: ArrowItems) -> None:
    plain = torch.cat([maker(items).make(k, 0).items for k in range(20)])
    mirrored = torch.cat([maker(items, horizontal_flip=True).make(k, 0).items for k in range(20)])
    is_mirrored = (mirrored == plain.flip(-1)).all(dim=(1, 2, 3))
    is_plain = (mirrored == plain).all(dim=(1, 2, 3))
    assert bool((is_mirrored ^ is_plain).all())
    assert 0.4 < float(is_mirrored.float().mean()) < 0.6


def test_labels_go_with_their_images_and_some_are_hidden(items: ArrowItems) -> None:
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
