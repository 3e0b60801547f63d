"""The pictures of a report, as strings that go straight into the page."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from PIL import Image

from diffusion_core import NoiseSchedule
from pipeline.scores import show_number

INK, ACCENT, MUTED = "#1f2933", "#0b6e99", "#9aa5b1"
COLOURS = (ACCENT, "#b35c00", "#3f7d20", "#7a3e9d")  # of protocols
LEAST_SCORE = 1e-4  # on a log axis: rounding may make a score of nearly equal sets negative
SWEPT = {"num_steps": "DDIM steps", "eta": "eta: noise put back at each step"}
SMOOTHED_SHARE = 0.05  # of the curve that one point of the smoothed line averages


def draw_uri(items: np.ndarray, columns: int, tile_px: int) -> str:
    """A grid of uint8 images [N, C, H, W] or of float32 sequences [N, C, L] as a PNG data URI."""
    if items.dtype == np.uint8:
        content = draw_grid(items, columns, tile_px)
    else:
        content = draw_sequences(items, columns)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def draw_grid(images: np.ndarray, columns: int, tile_px: int, gap_px: int = 4) -> bytes:
    """A grid of uint8 images [N, C, H, W] as a PNG.

    Small images are enlarged smoothly to about `tile_px`, which is how an eye reads them; none
    is made smaller.
    """
    tiles = [_tile(image, tile_px) for image in images]
    width, height = tiles[0].size
    rows = math.ceil(len(tiles) / columns)
    canvas = Image.new(
        "RGB", (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px), "white"
    )
    for k, tile in enumerate(tiles):
        canvas.paste(tile, (k % columns * (width + gap_px), k // columns * (height + gap_px)))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw_sequences(sequences: np.ndarray, columns: int) -> bytes:
    """A grid of curves of sequences [N, C, L], with one scale for all, as a PNG."""
    rows = math.ceil(len(sequences) / columns)
    figure = Figure(figsize=(1.5 * columns, 0.9 * rows), layout="constrained")
    for axes, sequence in zip(
        figure.subplots(rows, columns, sharey=True, squeeze=False).flat, sequences, strict=False
    ):
        axes.plot(sequence.T, linewidth=0.8)
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _tile(image: np.ndarray, tile_px: int) -> Image.Image:
    pixels = image.transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    scale = max(1, round(tile_px / picture.width))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def loss_curve(steps: Sequence[float], losses: Sequence[float]) -> str:
    """The training loss, raw and smoothed, against optimiser steps, as SVG."""
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=MUTED, linewidth=0.8, label="mean of 20 steps")
    width = max(1, round(len(losses) * SMOOTHED_SHARE))
    if width > 1:
        kernel = np.ones(width) / width
        smooth = np.convolve(losses, kernel, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=ACCENT, linewidth=1.8, label="smoothed")
        axes.legend(frameon=False)
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylim(top=float(np.quantile(losses, 0.98)) * 1.5)
    return to_svg(figure)


def score_curve(steps: Sequence[float], values: Sequence[float], name: str) -> str:
    """Scores made while training went on, against optimiser steps, as SVG."""
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [max(value, LEAST_SCORE) for value in values], "o-", color=ACCENT)
    axes.set(xlabel="optimiser step", ylabel=name, yscale="log", xlim=(0, None))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    return to_svg(figure)


def schedule_curve(schedule: NoiseSchedule) -> str:
    """Signal and noise scale, and log SNR, against the timestep, as SVG."""
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    t = torch.arange(schedule.num_train_timesteps)
    left.plot(t, schedule.signal_scale, color=ACCENT, label="signal")
    left.plot(t, schedule.noise_scale, color=INK, label="noise")
    left.set(xlabel="timestep", title="scales")
    left.legend(frameon=False)
    right.plot(t, schedule.snr.log(), color=ACCENT)
    right.axhline(0, color=MUTED, linewidth=0.8)
    right.set(xlabel="timestep", title="log SNR")
    return to_svg(figure)


def sweep_curve(
    settings: Sequence[float], values: Sequence[float], name: str, score: Mapping[str, Any]
) -> str:
    """Scores against a setting of the sampler, with the one that the model is scored with, as SVG.

    Args:
        settings: that were tried.
        values: of the score at each.
        name: of the setting.
        score: the record, with the sweeps' name and the setting that counts.
    """
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = [max(value, LEAST_SCORE) for value in values]
    axes.plot(settings, shown, "o-", color=ACCENT)
    axes.axvline(score["protocol"][name], color=INK, linewidth=0.8, linestyle=":", label="scored")
    axes.set(xlabel=SWEPT[name], ylabel=score["sweeps"]["metric"], yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    is_narrow = max(shown) < 10 * min(shown)  # else the labels would overlap
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if is_narrow else NullFormatter())
    axes.legend(frameon=False)
    return to_svg(figure)


def score_scale(value: float, floor: float, ceiling: float | None, name: str) -> str:
    """Where a score lies, with its floor and its ceiling if it has one, on a log axis, as SVG."""
    figure = Figure(figsize=(10.5, 1.5), layout="constrained")
    axes = figure.subplots()
    low = max(min(value, floor) / 2, LEAST_SCORE)
    high = 2 * max(value, floor if ceiling is None else ceiling, low)
    axes.set(xscale="log", xlim=(low, high), ylim=(-1.5, 1.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.axhline(0, color=MUTED, linewidth=1, zorder=0)
    marks = [  # at two heights, for floor and value may be close
        (floor, f"real images: {show_number(floor)}", -1.1, INK),
        (value, f"evaluated: {show_number(value)}", 0.55, ACCENT),
    ]
    if ceiling is not None:
        marks.append((ceiling, f"untrained: {show_number(ceiling)}", -1.1, INK))
    for x, label, height, colour in marks:
        axes.plot([max(x, low)], [0], "o", color=colour, markersize=9)
        axes.annotate(label, (max(x, low), height), ha="center", color=colour, fontsize=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{name} (lower is better, log scale)")
    return to_svg(figure)


def score_history(
    points: Sequence[tuple[float, float, int]],
    reigns: Sequence[tuple[float, int, Mapping[int, float]]],
    name: str,
) -> str:
    """The score of the champion over time, with those of all versions, as SVG.

    Only scores under one protocol are joined; protocols are numbered from 0.

    Args:
        points: time (seconds since the epoch), score and protocol of each score there is.
        reigns: when each champion became it, its number, and its scores by protocol, the oldest
            first.
        name: of the score.
    """
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    axes = figure.subplots()

    def at(seconds: float) -> float:
        return float(date2num(datetime.fromtimestamp(seconds, UTC)))

    protocols = sorted({protocol for _, _, protocol in points})
    for protocol in protocols:
        of_it = [(at(time), max(value, LEAST_SCORE)) for time, value, p in points if p == protocol]
        colour = COLOURS[protocol % len(COLOURS)]
        dots = {"markersize": 4, "color": colour, "alpha": 0.5, "label": f"protocol {protocol + 1}"}
        axes.plot(*zip(*of_it, strict=True), "o", **dots)
        for k, (since, number, scores) in enumerate(reigns):
            if protocol not in scores:
                continue
            value = max(scores[protocol], LEAST_SCORE)
            line = [(at(since), value)]
            if k + 1 < len(reigns):
                until, _, following = reigns[k + 1]
                line.append((at(until), value))
                if protocol in following:
                    line.append((at(until), max(following[protocol], LEAST_SCORE)))
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.8)
            axes.plot(*line[0], "o", markersize=8, color=colour)
            axes.annotate(str(number), line[0], (6, 6), textcoords="offset points")
    axes.set(ylabel=name)
    axes.margins(x=0.05, y=0.15)
    dates = AutoDateLocator(tz=UTC, minticks=3, maxticks=8)
    axes.xaxis.set_major_locator(dates)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(dates, tz=UTC))
    if len(protocols) > 1:
        axes.legend(frameon=False)
    return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """A figure as SVG text to put into a page."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
