"""The beta study: schedules side by side, on one page that needs no other file."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from diffusion_core import Diffusion, NoiseSchedule, make_image_noise, make_schedule
from diffusion_core.schedules import SCHEDULES
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.models import make_diffusion
from pipeline.report.page import render
from pipeline.report.plots import MUTED, draw_uri, to_svg
from pipeline.sampling import quantise
from pipeline.settings import Config

NEAR_NOISE_SNR = 0.01  # the signal a tenth of the noise
SHOWN_STEPS = 12
IMAGE_PX = 64


def write_study(
    target: Sequence[str], num_train_timesteps: int, image: Path | None, output: Path
) -> list[dict[str, Any]]:
    """Draws the named schedules, or a config's beside the default, into an HTML file.

    Args:
        target: schedule names; all that need no options when empty.
        num_train_timesteps: T of the named ones.
        image: the picture to noise; a drawn one when None.
        output: the file to write.

    Returns:
        A row for each schedule: `name`, `signal_left` (abar, or a^2, at the last step),
        `near_noise` (share of steps with SNR below 0.01) and `warning`.

    Raises:
        ConfigError: an unknown name, or one that makes no schedule with this T.
        DataError: the image cannot be read.
        StorageError: the file cannot be written.
    """
    names = target or [name for name in SCHEDULES if name != "trained_betas"]
    return _write([_make(name, num_train_timesteps) for name in names], image, output)


def write_config_study(config: Config, image: Path | None, output: Path) -> list[dict[str, Any]]:
    """The same for the schedule of a config, beside `cosine` and `linear` with the same T."""
    num_train_timesteps = config.diffusion.num_train_timesteps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = make_diffusion(config).schedule
    said = str(caught[0].message) if caught else ""
    others = [name for name in ("cosine", "linear") if name != own.name]
    studied = [(own, said), *(_make(name, num_train_timesteps) for name in others)]
    return _write(studied, image, output)


def _make(name: str, num_train_timesteps: int) -> tuple[NoiseSchedule, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            schedule = make_schedule(name, num_train_timesteps)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return schedule, str(caught[0].message) if caught else ""


def _write(
    studied: Sequence[tuple[NoiseSchedule, str]], image: Path | None, output: Path
) -> list[dict[str, Any]]:
    pixels = _drawn_image() if image is None else _read_image(image)
    schedules = [schedule for schedule, _ in studied]
    rows = [
        {
            "name": schedule.name,
            "signal_left": float(schedule.signal_scale[-1] ** 2),
            "near_noise": float((schedule.snr < NEAR_NOISE_SNR).double().mean()),
            "warning": warning,
        }
        for schedule, warning in studied
    ]
    page = render(
        "schedules.html.jinja",
        rows=rows,
        num_train_timesteps=schedules[0].num_train_timesteps,
        curves=_curves(schedules),
        strips=[(schedule.name, _strip(schedule, pixels)) for schedule in schedules],
    )
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"Cannot write {output}: {error.strerror}. Give another --output."
        ) from error
    return rows


def _curves(schedules: Sequence[NoiseSchedule]) -> str:
    """Signal, noise and log SNR of all schedules over their timesteps, as SVG."""
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    signal, noise, log_snr = figure.subplots(1, 3)
    for schedule in schedules:
        u = torch.linspace(0, 1, schedule.num_train_timesteps)
        signal.plot(u, schedule.signal_scale, label=schedule.name)
        noise.plot(u, schedule.noise_scale)
        finite = schedule.snr > 0
        log_snr.plot(u[finite], schedule.snr[finite].log())
    for axes, title in ((signal, "signal scale"), (noise, "noise scale"), (log_snr, "log SNR")):
        axes.set(title=title, xlabel="share of the timesteps")
    log_snr.axhline(0, color=MUTED, linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=min(len(schedules), 4), frameon=False)
    return to_svg(figure)


def _strip(schedule: NoiseSchedule, pixels: np.ndarray) -> str:
    """The image at evenly spaced timesteps, with one noise for all schedules, as a PNG."""
    t = torch.linspace(0, schedule.num_train_timesteps - 1, SHOWN_STEPS).round().long()
    x_start = torch.from_numpy(pixels).float().div(127.5).sub(1).expand(SHOWN_STEPS, *pixels.shape)
    noise, _ = make_image_noise(pixels.shape, [0])
    noised = Diffusion(schedule, "pred_v").q_sample(x_start, t, noise.expand_as(x_start))
    return draw_uri(quantise(noised), SHOWN_STEPS, IMAGE_PX)


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            square = image.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(
            f"Cannot read the image {path}: {error}. Give another --image, or none."
        ) from error
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _drawn_image() -> np.ndarray:
    """A face of few shapes: large areas and small detail, to see which noise hides which."""
    y, x = np.mgrid[0:IMAGE_PX, 0:IMAGE_PX] / (IMAGE_PX - 1) * 2 - 1
    picture = np.stack([0.25 + 0.2 * y, 0.35 + 0.2 * x, 0.6 + 0 * x])
    shapes = (
        (x**2 + y**2 < 0.64, (0.95, 0.8, 0.3)),
        ((abs(abs(x) - 0.28) < 0.09) & (abs(y + 0.2) < 0.13), (0.1, 0.1, 0.15)),
        ((x**2 + y**2 < 0.28) & (x**2 + y**2 > 0.17) & (y > 0.12), (0.6, 0.15, 0.1)),
    )
    for where, colour in shapes:
        picture[:, where] = np.array(colour)[:, None]
    return (picture * 255).round().astype(np.uint8)
