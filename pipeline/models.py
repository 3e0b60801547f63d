"""From the config to the network and the process, the same in every step."""

import torch

from diffusion_core import Diffusion, UNet, UNetConfig, make_schedule
from pipeline.errors import ConfigError
from pipeline.settings import Config

BYTES_PER_WEIGHT = {"weights": 4, "gradients": 4, "AdamW": 8, "EMA": 4}  # in training, float32


def make_diffusion(config: Config, num_classes: int | None = None) -> Diffusion:
    """The schedule and objective that the config names.

    Args:
        config: the whole config.
        num_classes: of the data set, where the network is told the class.

    Raises:
        ConfigError: the schedule's options are wrong or make no schedule.
    """
    d = config.diffusion
    try:
        schedule = make_schedule(d.schedule, d.num_train_timesteps, **d.schedule_options)
        if d.zero_terminal_snr:
            schedule = schedule.zero_terminal_snr()
        return Diffusion(
            schedule,
            d.objective,
            d.weighting,
            d.gamma,
            offset_noise=d.offset_noise,
            self_condition=d.self_condition,
            learned_variance=d.learned_variance,
            null_label=num_classes,
        )
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from error


def make_unet(config: Config, seed: int, num_classes: int | None = None) -> UNet:
    """The untrained network; equal seeds give equal weights.

    Args:
        config: the whole config.
        seed: of the weights.
        num_classes: of the data set, where the network is told the class.
    """
    unet_config = UNetConfig(
        channels=config.data.channels,
        is_sequence=config.data.is_sequence,
        self_condition=config.diffusion.self_condition,
        learned_variance=config.diffusion.learned_variance,
        num_classes=num_classes,
        **config.model.model_dump(exclude={"class_conditional"}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(unet_config)


def count_parameters(config: Config) -> int:
    """The number of weights of the network, without making them.

    Raises:
        ConfigError: there is no such network.
    """
    try:
        with torch.device("meta"):
            return sum(weights.numel() for weights in make_unet(config, 0).parameters())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def bytes_in_training(config: Config) -> int:
    """Memory that training keeps on each device, without activations.

    Raises:
        ConfigError: there is no such network.
    """
    return count_parameters(config) * sum(BYTES_PER_WEIGHT.values())
