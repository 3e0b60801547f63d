"""What the learner asks of torch for speed."""

from pathlib import Path

import torch
from torch import nn

from pipeline.config import load_config
from pipeline.learner import Learner
from pipeline.models import make_diffusion, make_unet
from pipeline.stopwatch import Stopwatch


def test_the_optimiser_is_fused_and_features_lie_channels_last(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    learner = Learner(
        config.train,
        make_unet(config, 0),
        make_diffusion(config),
        torch.device("cpu"),
        1,
        Stopwatch(),
    )
    assert learner.optimizer.defaults["fused"] is True
    seen: list[bool] = []
    for module in learner.model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(
                lambda module, args, y: seen.append(
                    y.is_contiguous(memory_format=torch.channels_last)
                )
            )
    learner.model(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    assert seen
    assert all(seen)
