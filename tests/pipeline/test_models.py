"""What the config's words make of the process and the network."""

from pathlib import Path

import torch

from diffusion_core import Diffusion, make_schedule
from pipeline.config import load_config
from pipeline.models import make_diffusion, make_unet


def test_the_process_is_what_the_config_says(tiny_config: Path) -> None:
    settings = ["objective=pred_x0", "weighting=min_snr", "gamma=2.0", "offset_noise=0.25"]
    config = load_config(tiny_config, [f"diffusion.{setting}" for setting in settings])
    found = make_diffusion(config, num_classes=3)
    expected = Diffusion(make_schedule("cosine", 100), "pred_x0", "min_snr", 2.0)
    assert torch.equal(found.weights, expected.weights)
    assert (found.objective, found.offset_noise, found.null_label) == ("pred_x0", 0.25, 3)


def test_equal_seeds_give_equal_weights_and_others_others(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    first, again, other = (make_unet(config, seed).init_conv.weight for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
