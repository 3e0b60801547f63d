"""The pictures of an experiment's page, as SVG."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from diffusion_core import NoiseSchedule
from pipeline.report.plots import ACCENT, INK, MUTED, to_svg

STOPPED = "#c2410c"
LOG_SPAN = 20.0  # values that span more than this factor are drawn on a log axis
COLUMNS = 3


def compare_schedules(found: NoiseSchedule, default: NoiseSchedule, name: str) -> str:
    """Signal and noise scale and log SNR of two schedules over their timesteps.

    Args:
        found: that is recommended.
        default: of the config as it is.
        name: of the found one.
    """
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    signal, noise, log_snr = figure.subplots(1, 3)
    for schedule, label, colour in ((default, "as configured", MUTED), (found, name, ACCENT)):
        u = torch.linspace(0, 1, schedule.num_train_timesteps)
        signal.plot(u, schedule.signal_scale, color=colour, label=label)
        noise.plot(u, schedule.noise_scale, color=colour)
        finite = schedule.snr > 0
        log_snr.plot(u[finite], schedule.snr[finite].log(), color=colour)
    for axes, title in ((signal, "signal scale"), (noise, "noise scale"), (log_snr, "log SNR")):
        axes.set(title=title, xlabel="share of the timesteps")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return to_svg(figure)


def score_by_parameter(trials: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """The score of each trial against each parameter that was searched; None without any."""
    names = list(dict.fromkeys(name for trial in trials for name in trial["choice"]))
    if not names:
        return None
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(10.5, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        having = [trial for trial in trials if name in trial["choice"]]
        values = [trial["choice"][name] for trial in having]
        is_named = any(isinstance(value, str | bool) for value in values)
        kinds = sorted({str(value) for value in values})
        places = [kinds.index(str(value)) for value in values] if is_named else values
        for outcome, colour, marker in (("finished", ACCENT, "o"), ("stopped", STOPPED, "x")):
            chosen = [k for k, trial in enumerate(having) if trial["outcome"] == outcome]
            axes.plot(
                [places[k] for k in chosen],
                [having[k]["rungs"][-1]["value"] for k in chosen],
                marker,
                color=colour,
            )
        if is_named:
            axes.set_xticks(range(len(kinds)), kinds)
            axes.set_xlim(-0.5, len(kinds) - 0.5)
        elif min(values) > 0 and max(values) > LOG_SPAN * min(values):
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=4)  # long numbers must not touch
        axes.set(xlabel=name, yscale=_scale([t["rungs"][-1]["value"] for t in having]))
        axes.set_ylabel(metric if axes in grid[:, 0] else "")
    return to_svg(figure)


def parallel_coordinates(trials: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """A line for each trial through its parameters to its score; the lower, the darker."""
    names = list(dict.fromkeys(name for trial in trials for name in trial["choice"]))
    drawn = [trial for trial in trials if trial["choice"]]
    if not drawn:
        return None
    scores = np.array([trial["rungs"][-1]["value"] for trial in drawn])
    order = np.argsort(np.argsort(-scores))  # the best is drawn last
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    axes = figure.subplots()
    columns = [[trial["choice"].get(name) for trial in drawn] for name in names]
    heights = [_heights(column) for column in columns]
    heights.append(_heights([float(score) for score in scores]))
    labels = [*names, metric]
    for rank, k in sorted((rank, k) for k, rank in enumerate(order)):
        points = [(x, column[k]) for x, column in enumerate(heights) if column[k] is not None]
        share = (rank + 1) / len(drawn)
        style = "-" if drawn[k]["outcome"] == "finished" else ":"
        axes.plot(*zip(*points, strict=True), style, color=ACCENT, alpha=0.1 + 0.8 * share**2)
    for x, column in enumerate([*columns, [float(score) for score in scores]]):
        axes.axvline(x, color=MUTED, linewidth=0.8)
        known = [value for value in column if value is not None]
        low, high = _ends(known)
        axes.annotate(low, (x, -0.03), ha="center", va="top", fontsize=8)
        axes.annotate(high, (x, 1.03), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
    axes.set(yticks=[], ylim=(-0.12, 1.12))
    axes.spines["left"].set_visible(False)
    return to_svg(figure)


def learning_curves(trials: Sequence[Mapping[str, Any]], rungs: Sequence[int], metric: str) -> str:
    """The scores of each trial on its way, with a cross where it was stopped."""
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        images = [rung["images_seen"] for rung in trial["rungs"]]
        values = [rung["value"] for rung in trial["rungs"]]
        is_default = trial["number"] == 0
        colour = INK if is_default else ACCENT
        width = 1.8 if is_default else 1.0
        label = "as configured" if is_default else None
        axes.plot(images, values, ".-", color=colour, linewidth=width, alpha=0.8, label=label)
        if trial["outcome"] == "stopped":
            axes.plot(images[-1:], values[-1:], "x", color=STOPPED, markersize=9, zorder=3)
    if any(trial["outcome"] == "stopped" for trial in trials):
        axes.plot([], [], "x", color=STOPPED, markersize=9, label="stopped by ASHA")
    values = [rung["value"] for trial in trials for rung in trial["rungs"]]
    axes.set(xlabel="images seen", ylabel=metric, yscale=_scale(values))
    if len(rungs) > 1:
        axes.set_xscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return to_svg(figure)


def seed_spread(finalists: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Every seed's score of every finalist, with the means."""
    figure = Figure(figsize=(10.5, 0.5 * len(finalists) + 1.0), layout="constrained")
    axes = figure.subplots()
    for height, finalist in enumerate(reversed(finalists)):
        axes.plot(finalist["scores"], [height] * len(finalist["scores"]), "o", color=ACCENT)
        axes.plot([finalist["mean"]], [height], "|", color=INK, markersize=18, markeredgewidth=2)
    labels = [
        "as configured" if finalist["number"] == 0 else f"trial {finalist['number']:04d}"
        for finalist in reversed(finalists)
    ]
    axes.set_yticks(range(len(finalists)), labels)
    axes.set(xlabel=f"{metric} (lower is better)", ylim=(-0.6, len(finalists) - 0.4))
    return to_svg(figure)


def _scale(values: Sequence[float]) -> str:
    is_wide = bool(values) and min(values) > 0 and max(values) > LOG_SPAN * min(values)
    return "log" if is_wide else "linear"


def _heights(column: Sequence[Any]) -> list[float | None]:
    """Values as shares of their axis, on a log scale where they span much."""
    known = [value for value in column if value is not None]
    if any(isinstance(value, str | bool) for value in known):
        kinds = sorted({str(value) for value in known})
        last = max(1, len(kinds) - 1)
        return [None if value is None else kinds.index(str(value)) / last for value in column]
    x = np.array([np.nan if value is None else value for value in column], dtype=float)
    if min(known) > 0 and max(known) > LOG_SPAN * min(known):
        x = np.log(x)
    low, high = np.nanmin(x), np.nanmax(x)
    shares = (x - low) / (high - low) if high > low else np.where(np.isnan(x), x, 0.5)
    return [None if np.isnan(share) else float(share) for share in shares]


def _ends(known: Sequence[Any]) -> tuple[str, str]:
    if any(isinstance(value, str | bool) for value in known):
        kinds = sorted({str(value) for value in known})
        return kinds[0], kinds[-1] if len(kinds) > 1 else ""
    return f"{min(known):.3g}", f"{max(known):.3g}"
