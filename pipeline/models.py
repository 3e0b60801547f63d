"""From the config to the network and the process, the same in every step."""

import torch

from diffusion_core import Diffusion, UNet, UNetConfig, make_schedule
from pipeline.config import Config
from pipeline.errors import ConfigError


def make_diffusion(config: Config) -> Diffusion:
    """The schedule and objective that the config names.

    Raises:
        ConfigError: the schedule's options are wrong or make no schedule.
    """
    d = config.diffusion
    try:
        schedule = make_schedule(d.schedule, d.num_train_timesteps, **d.schedule_options)
        return Diffusion(schedule, d.objective, d.weighting, d.gamma)
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from error


def make_unet(config: Config, seed: int) -> UNet:
    """The untrained network; equal seeds give equal weights."""
    m = config.model
    unet_config = UNetConfig(
        channels=config.data.channels,
        dim=m.dim,
        dim_mults=m.dim_mults,
        attention=m.attention,
        heads=m.heads,
        head_dim=m.head_dim,
        norm_groups=m.norm_groups,
        dropout=m.dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(unet_config)
