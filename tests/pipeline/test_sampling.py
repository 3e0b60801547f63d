from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_core import UNet
from pipeline.config import load_config
from pipeline.models import make_unet
from pipeline.sampling import draw_labels, quantise, sample_items
from pipeline.settings import Config

COUNTS = {0: 10, 1: 0, 2: 30, 3: 60}


def test_labels_are_drawn_with_the_shares_of_the_data_set() -> None:
    labels = draw_labels(COUNTS, 0, range(20_000)).numpy()
    shares = np.bincount(labels, minlength=4) / len(labels)
    np.testing.assert_allclose(shares, [0.1, 0, 0.3, 0.6], atol=0.015)  # more than 4 deviations
    assert shares[1] == 0


def test_a_samples_label_is_the_same_in_whatever_company() -> None:
    labels = draw_labels(COUNTS, 0, range(200))
    parts = [draw_labels(COUNTS, 0, range(k, k + 50)) for k in range(0, 200, 50)]
    assert torch.equal(torch.cat(parts), labels)
    assert not torch.equal(draw_labels(COUNTS, 1, range(200)), labels)


def test_samples_of_a_class_vary_in_number_as_independent_draws_do() -> None:
    """Real images do, and a score compares with them."""
    numbers = [int((draw_labels(COUNTS, seed, range(100)) == 3).sum()) for seed in range(400)]
    deviation = np.sqrt(100 * 0.6 * 0.4)
    assert abs(np.std(numbers) / deviation - 1) < 0.15  # more than 4 deviations
    assert abs(np.mean(numbers) - 60) < 4 * deviation / np.sqrt(400)


@pytest.fixture
def network(tiny_config: Path) -> tuple[Config, UNet]:
    """One whose samples show what it is told; with dropout, were it to train."""
    config = load_config(tiny_config, ["model.class_conditional=true", "model.dropout=0.5"])
    model = make_unet(config, 0, 3)
    with torch.no_grad():  # a new one puts out zeros
        model.final_conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    return config, model


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"num_steps": 5},
        {"spacing": "leading"},
        {"eta": 1.0},
        {"clip_x_start": False},
        {"guidance_scale": 3.0},
    ],
    ids=str,
)
def test_each_setting_of_the_sampler_changes_the_samples(
    network: tuple[Config, UNet], changed: dict[str, Any]
) -> None:
    config, model = network
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changed)})
    plain, again, different = (
        sample_items(c, model.train(), range(2), class_labels=torch.tensor([0, 2]))
        for c in (config, config, other)
    )
    assert torch.equal(again, plain)  # nothing is dropped
    assert not torch.allclose(different, plain, atol=1e-3)


def test_images_are_rounded_to_the_nearest_level() -> None:
    levels = torch.arange(256.0)
    for off in (-0.4, 0.4):
        assert quantise((levels + off) / 127.5 - 1).tolist() == levels.tolist()
