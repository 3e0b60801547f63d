"""What the learner asks of torch for speed."""

from pathlib import Path

import torch
from torch import nn

from pipeline.config import load_config
from pipeline.learner import Learner
from pipeline.models import make_diffusion, make_unet
from pipeline.stopwatch import Stopwatch


def test_the_optimiser_is_what_the_config_says_and_fused_and_features_lie_channels_last(
    tiny_config: Path,
) -> None:
    settings = ["betas=[0.8, 0.95]", "weight_decay=0.125", "learning_rate=0.5"]
    config = load_config(tiny_config, [f"train.{setting}" for setting in settings])
    learner = Learner(
        config.train,
        make_unet(config, 0),
        make_diffusion(config),
        torch.device("cpu"),
        1,
        Stopwatch(),
    )
    assert isinstance(learner.optimizer, torch.optim.AdamW)
    chosen = {name: learner.optimizer.defaults[name] for name in ("betas", "weight_decay", "lr")}
    assert chosen == {"betas": (0.8, 0.95), "weight_decay": 0.125, "lr": 0.5}
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
