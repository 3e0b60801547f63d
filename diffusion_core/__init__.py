"""Diffusion models as pure PyTorch mathematics: schedules, objectives, samplers, networks.

No files, no processes, no Ray, no global random state: those live in `pipeline`.
"""

from diffusion_core.ema import EMA
from diffusion_core.process import Diffusion, Prediction
from diffusion_core.samplers import CHUNK, make_image_noise, sample_ddim
from diffusion_core.schedules import NoiseSchedule, make_schedule
from diffusion_core.timesteps import make_timesteps
from diffusion_core.unet import UNet, UNetConfig

__all__ = [
    "CHUNK",
    "EMA",
    "Diffusion",
    "NoiseSchedule",
    "Prediction",
    "UNet",
    "UNetConfig",
    "make_image_noise",
    "make_schedule",
    "make_timesteps",
    "sample_ddim",
]
