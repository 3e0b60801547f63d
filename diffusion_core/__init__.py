"""Diffusion models as pure PyTorch mathematics: schedules, objectives, samplers, networks.

No files, no processes, no Ray, no global random state: those live in `pipeline`.
"""

from diffusion_core.bound import Bound, variational_bound
from diffusion_core.ema import EMA, PostHocEMA, Snapshot, reconstruct
from diffusion_core.interpolation import interpolate
from diffusion_core.networks import PointMLP, TinyUNet
from diffusion_core.noise import make_image_noise
from diffusion_core.process import Diffusion, Prediction
from diffusion_core.samplers import (
    CHUNK,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
)
from diffusion_core.schedules import NoiseSchedule, make_schedule
from diffusion_core.timesteps import draw_timesteps, make_timesteps
from diffusion_core.unet import UNet, UNetConfig

__all__ = [
    "CHUNK",
    "EMA",
    "Bound",
    "Diffusion",
    "NoiseSchedule",
    "PointMLP",
    "PostHocEMA",
    "Prediction",
    "Snapshot",
    "TinyUNet",
    "UNet",
    "UNetConfig",
    "draw_timesteps",
    "interpolate",
    "make_image_noise",
    "make_schedule",
    "make_timesteps",
    "reconstruct",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "variational_bound",
]
