"""On which items the validation loss is measured; that ranks share them is in `test_ranks.py`."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_core import Diffusion, make_schedule
from pipeline.loader import draw_noise, draw_timesteps
from pipeline.settings import NOISE_GROUP
from pipeline.validation import NEIGHBOURS, NUM_SAMPLES, choose_items, validation_loss


@pytest.mark.parametrize("num_items", [0, 1, 511, 512, 513, 519, 520, 1181, 100_003])
@pytest.mark.parametrize("at_most", [1, 8, 13, 512])
def test_items_are_as_many_as_asked_for_each_once(num_items: int, at_most: int) -> None:
    chosen = choose_items(num_items, at_most)
    assert len(chosen) == min(num_items, at_most)
    assert (np.diff(chosen) > 0).all()
    assert not len(chosen) or (chosen[0] == 0 and chosen[-1] < num_items)
    if at_most > NEIGHBOURS:
        assert not len(chosen) or chosen[-1] == num_items - 1


def test_items_are_of_all_classes_though_the_split_is_in_their_order() -> None:
    classes = np.repeat(np.arange(10), 1000)
    shares = np.bincount(classes[choose_items(len(classes), 512)], minlength=10) / 512
    np.testing.assert_allclose(shares, 0.1, atol=0.02)


def test_few_places_of_a_split_are_read() -> None:
    chosen = choose_items(1_000_000, 512)
    assert (np.diff(chosen) > 1).sum() == 512 // NEIGHBOURS - 1


class Brightness:
    """A split of images of one value each, one in three without a label."""

    shape = (1, 2, 2)

    def __init__(self, count: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 1), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        return self.pixels[ids].repeat(2, 2).repeat(2, 3)

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        return ids % 3 - 1


class Told(nn.Module):
    """A network whose word depends on its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, guess: None, class_labels: Tensor) -> Tensor:
        return self.weight * x + class_labels.view(-1, 1, 1, 1) + 0.01 * t.view(-1, 1, 1, 1)


def test_it_is_the_mean_over_the_chosen_items_with_noise_and_timesteps_of_their_own() -> None:
    items: Any = Brightness(700)
    diffusion = Diffusion(make_schedule("cosine", 100), offset_noise=0.5, null_label=7)
    model, ids = Told(), choose_items(700, NUM_SAMPLES)
    key = (5, -1, 0)  # a number that no batch has
    labels = torch.from_numpy(items.labels_of(ids))
    with torch.no_grad():
        losses = diffusion.loss_per_sample(
            model,
            torch.from_numpy(items.gather(ids)) / 127.5 - 1,
            t=draw_timesteps(key, len(ids), 100, "stratified"),
            noise=draw_noise(key, range(len(ids) // NOISE_GROUP), items.shape, 0.5),
            class_labels=labels.masked_fill(labels < 0, 7),
        )
    found = validation_loss(model, diffusion, items, seed=5)
    assert found == pytest.approx(float(losses.double().mean()), rel=1e-5)
