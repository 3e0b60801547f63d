"""What the learner asks of torch for speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.batches import Batch
from pipeline.config import load_config
from pipeline.errors import ClusterError
from pipeline.learner import Learner
from pipeline.meter import Meter
from pipeline.models import make_diffusion, make_unet
from pipeline.stopwatch import Stopwatch


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers that Python reads out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Whatever torch does."""
        waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in waiting
        return func(*args, **(kwargs or {}))


def make(path: Path, settings: Sequence[str]) -> tuple[Learner, Batch]:
    """A learner of a config with these settings, and a batch for it."""
    config = load_config(path, list(settings))
    num_classes = 3 if config.model.class_conditional else None
    diffusion = make_diffusion(config, num_classes)
    learner = Learner(
        config.train,
        make_unet(config, 0, num_classes),
        diffusion,
        torch.device("cpu"),
        1,
        Stopwatch(),
    )
    batch = Batch(
        items=torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8),
        timesteps=torch.randint(0, 100, (32,)),
        noise=torch.randn(32, 1, 8, 8),
        class_labels=torch.randint(0, 3, (32,)) if num_classes else None,
        self_condition=True if diffusion.self_condition else None,
    )
    return learner, batch


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["diffusion.self_condition=true", "diffusion.learned_variance=true"],
        ["model.class_conditional=true"],
    ],
    ids=["plain", "guess", "labels"],
)
def test_a_step_reads_no_number_but_whether_it_is_finite(
    tiny_config: Path, parts: int, settings: list[str]
) -> None:
    learner, batch = make(tiny_config, [f"train.accumulation_steps={parts}", *settings])
    diffusion = learner.diffusion
    meter = Meter(diffusion.num_train_timesteps, torch.device("cpu"))
    assert learner.learn(batch, 0, meter)
    # The one that is left, whether loss and gradient are finite, is read as a list of both, which
    # torch does not pass on for a tensor in the host's memory.
    with Reads() as reads:
        assert learner.learn(batch, 1, meter)
    assert reads.count == 0
    with Reads() as reads:
        diffusion.loss_per_sample(learner.model, batch.x_start(), t=batch.timesteps)
    assert reads.count >= 2  # so they would be seen: of the values of x_start, and of t


def test_the_optimiser_is_what_the_config_says_and_fused_and_features_lie_channels_last(
    tiny_config: Path,
) -> None:
    settings = [
        "betas=[0.8, 0.95]", "weight_decay=0.125", "learning_rate=0.5", "ema_decay=0.25"
    ]  # fmt: skip
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
    assert learner.ema.decay_at(1000) == 0.25
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


def test_a_gpu_without_memory_is_told_what_takes_less(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, batch = make(tiny_config, ["train.accumulation_steps=2"])
    meter = Meter(learner.diffusion.num_train_timesteps, torch.device("cpu"))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(learner.replica, "backward", fail)
    with pytest.raises(ClusterError, match=r"Raise train\.accumulation_steps"):
        learner.learn(batch, 0, meter)
