"""The page and the table of an experiment: what was tried, what it showed, and how to use it."""

import csv
import io
import shlex
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from diffusion_core import NoiseSchedule
from pipeline.config import override_config
from pipeline.models import make_diffusion
from pipeline.publish import training_command
from pipeline.report.page import render
from pipeline.report.plots import draw_uri
from pipeline.report.tune_plots import (
    compare_schedules,
    learning_curves,
    parallel_coordinates,
    score_by_parameter,
    seed_spread,
)
from pipeline.settings import Config
from pipeline.storage import Storage
from pipeline.tune.records import SEED, TrialStore

COLUMNS, TILE_PX = 16, 40


def make_page(document: Mapping[str, Any], config: Config, storage: Storage) -> str:
    """Renders the page of an experiment.

    Args:
        document: `tune.json`.
        config: the base.
        storage: the root, with the samples of the trials.
    """
    searched = [trial for trial in document["trials"] if SEED not in trial["name"]]
    scored = [trial for trial in searched if trial["rungs"] and trial["outcome"] != "failed"]
    by_number = {trial["number"]: trial for trial in searched}
    finished = [trial for trial in scored if trial["outcome"] == "finished"]
    ranked = sorted(finished, key=lambda trial: trial["rungs"][-1]["value"])
    shown = by_number[document["recommended"]]
    if shown["number"] == 0 and document["verdict"]["lowest"] != 0:
        shown = by_number[document["verdict"]["lowest"]]  # nothing to compare the default with
    name = "as configured" if shown["number"] == 0 else f"trial {shown['name']}"
    return render(
        "tune.html.jinja",
        document=document,
        config=config,
        searched=searched,
        ranked=ranked,
        stopped=[trial for trial in searched if trial["outcome"] == "stopped"],
        failed=[trial for trial in document["trials"] if trial["outcome"] == "failed"],
        recommended=by_number[document["recommended"]],
        shown_name=name,
        schedules=compare_schedules(
            _schedule(config, shown["overrides"]), _schedule(config, []), name
        ),
        spread=seed_spread(document["finalists"], document["metric"]),
        parameters=score_by_parameter(scored, document["metric"]),
        parallel=parallel_coordinates(scored, document["metric"]),
        curves=learning_curves(scored, document["rungs"], document["metric"]),
        grids=_draw_grids(scored, by_number[document["verdict"]["lowest"]], document, storage),
        command=training_command(document["overrides"]),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def make_table(document: Mapping[str, Any]) -> str:
    """All trainings as CSV: one a line, with parameters, scores and costs."""
    names = list(dict.fromkeys(name for trial in document["trials"] for name in trial["choice"]))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ["name", "number", "outcome", "score", "images_seen", "train_s", "score_s", "seconds"]
    writer.writerow([*head, *names, "overrides", "reason"])
    for trial in document["trials"]:
        last = trial["rungs"][-1] if trial["rungs"] else {"value": "", "images_seen": 0}
        writer.writerow(
            [
                trial["name"],
                trial["number"],
                trial["outcome"],
                last["value"],
                last["images_seen"],
                sum(rung["train_s"] for rung in trial["rungs"]),
                sum(rung["score_s"] for rung in trial["rungs"]),
                trial["seconds"],
                *(trial["choice"].get(name, "") for name in names),
                " ".join(f"--set {shlex.quote(text)}" for text in trial["overrides"]),
                trial["reason"].strip().splitlines()[-1] if trial["reason"] else "",
            ]
        )
    return buffer.getvalue()


def _schedule(config: Config, overrides: list[str]) -> NoiseSchedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trials have had their say
        return make_diffusion(override_config(config, overrides)).schedule


def _draw_grids(
    scored: list[dict[str, Any]],
    lowest: dict[str, Any],
    document: Mapping[str, Any],
    storage: Storage,
) -> list[tuple[str, str]]:
    """Samples of the best over seeds, the default and the worst, from the same noise."""
    chosen = [("lowest mean over seeds", lowest)]
    chosen += [("as configured", trial) for trial in scored if trial["number"] == 0]
    worst = max(scored, key=lambda trial: trial["rungs"][-1]["value"])
    chosen += [("highest score of the search", worst)]
    drawn, seen = [], set()
    for label, trial in chosen:
        if trial["number"] in seen or not trial["rungs"]:
            continue
        seen.add(trial["number"])
        last = trial["rungs"][-1]
        content = TrialStore(storage, f"steps/trial/{trial['key']}").read_samples(last["step"])
        if content is not None:
            items: np.ndarray = safetensors.numpy.load(content)["items"]
            stopped = f", stopped at {last['images_seen']:,} images"
            caption = (
                f"{label}: trial {trial['name']}, {document['metric']} {last['value']:.4g}"
                f"{stopped if trial['outcome'] == 'stopped' else ''}"
            )
            drawn.append((caption, draw_uri(items, COLUMNS, TILE_PX)))
    return drawn
