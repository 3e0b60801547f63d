"""The step `report`: all about a run or an evaluation, on one page that needs no other file."""

import json
import re
import time
from typing import Any

import jinja2
import numpy as np
import safetensors.numpy

from pipeline.models import make_diffusion
from pipeline.report.plots import (
    draw_uri,
    loss_curve,
    schedule_curve,
    score_curve,
    score_scale,
    sweep_curve,
)
from pipeline.scores import show_number
from pipeline.workflow import StepContext

COLUMNS, SHOWN = 8, 64
TILE_PX, STRIP_TILE_PX = 50, 88  # about how large one image is drawn
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")  # of TOML


def report(context: StepContext) -> dict[str, Any]:
    """Renders the page of a run from the other steps' results."""
    inputs, config = context.inputs, context.config
    history = [
        json.loads(line) for line in context.read_input("train", "metrics.jsonl").splitlines()
    ]
    scores = []  # made while it trained, if that was asked for
    if "fid.jsonl" in inputs["train"]["artifacts"]:
        lines = context.read_input("train", "fid.jsonl").splitlines()
        scores = [json.loads(line) for line in lines]
    page = render(
        "report.html.jinja",
        **_describe_evaluation(context),
        title=config.name,
        config_text=_config_text(config.model_dump(mode="json", exclude={"cluster", "storage"})),
        train=inputs["train"]["metrics"],
        promotion=inputs["promote"]["metrics"],
        loss=loss_curve([h["global_step"] for h in history], [h["loss"] for h in history]),
        scores=scores,
        score_curve=_draw_scores(scores),
        schedule=schedule_curve(make_diffusion(config).schedule),
    )
    context.write_artifact("report.html", page.encode())
    return {"bytes": len(page)}


def report_evaluation(context: StepContext) -> dict[str, Any]:
    """Renders the page of a model made elsewhere, or of images that were given."""
    config = context.config
    sections = {"name", "data", "features", "evaluate"}
    page = render(
        "evaluation.html.jinja",
        **_describe_evaluation(context),
        title=context.planned.step.settings["title"],
        subtitle=f"evaluated on the data set of {config.name}",
        config_text=_config_text(config.model_dump(mode="json", include=sections)),
    )
    context.write_artifact("report.html", page.encode())
    return {"bytes": len(page)}


def _describe_evaluation(context: StepContext) -> dict[str, Any]:
    """What both pages say of the score, the pictures, the data set and the steps."""
    inputs = context.inputs
    score = inputs["evaluate"]["metrics"]
    pictures = safetensors.numpy.load(context.read_input("evaluate", "pictures.safetensors"))
    return {
        "config": context.config,
        "score": score,
        "inputs": inputs,
        "data": inputs["preprocess"]["metrics"],
        "features": inputs["features"]["metrics"],
        "given": inputs["images"]["metrics"] if "images" in inputs else None,
        "timings": [(name, manifest["seconds"]) for name, manifest in inputs.items()],
        "versions": inputs["evaluate"]["versions"],
        "host": inputs["evaluate"]["host"],
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **_draw_pictures(pictures),
        "scale": score_scale(score["value"], score["floor"], score["ceiling"], score["metric"]),
        "sweeps": [
            (name, sweep_curve([x for x, _ in points], [y for _, y in points], name, score))
            for name, points in (score["sweeps"] or {"values": {}})["values"].items()
        ],
    }


def _draw_pictures(pictures: dict[str, np.ndarray]) -> dict[str, Any]:
    """The pictures of the step `evaluate` as data URIs, by what they show."""

    def strip(items: np.ndarray) -> str:
        return draw_uri(items, len(items), STRIP_TILE_PX)

    def named(prefix: str) -> list[tuple[str, np.ndarray]]:
        found = [name for name in pictures if name.startswith(prefix)]
        return [
            (name.removeprefix(prefix), pictures[name])
            for name in sorted(found, key=lambda name: int(name.removeprefix(prefix)))
        ]

    drawn: dict[str, Any] = {
        "shown": len(pictures["samples"]),
        "samples": draw_uri(pictures["samples"], COLUMNS, TILE_PX),
        "real": draw_uri(pictures["real"][:SHOWN], COLUMNS, TILE_PX),
        "by_class": [(label, strip(items)) for label, items in named("class-")],
        "interpolations": [strip(items) for _, items in named("interpolation-")],
        "neighbours": None,
    }
    for name in ("noising", "denoising"):
        drawn[name] = strip(pictures[name]) if name in pictures else None
    if "copied" in pictures:
        rows = np.concatenate([pictures["copied"][:, None], pictures["neighbours"]], axis=1)
        drawn["neighbours"] = draw_uri(
            rows.reshape(-1, *rows.shape[2:]), rows.shape[1], STRIP_TILE_PX
        )
    return drawn


def _draw_scores(scores: list[dict[str, Any]]) -> str | None:
    if not scores:
        return None
    steps, values = [s["global_step"] for s in scores], [s["value"] for s in scores]
    return score_curve(steps, values, scores[0]["metric"])


def render(template: str, **values: Any) -> str:
    """Fills a template of this package; a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = show_number
    return environment.get_template(template).render(**values)


def _config_text(config: dict[str, Any]) -> str:
    """A config as the TOML that would make it; what is not set is left out."""
    top = _toml_pairs({k: v for k, v in config.items() if not isinstance(v, dict)})
    sections = [
        "\n".join([f"\n[{name}]", *_toml_pairs(section)])
        for name, section in config.items()
        if isinstance(section, dict)
    ]
    return "\n".join([*top, *sections])


def _toml_pairs(table: dict[str, Any]) -> list[str]:
    keys = {k: k if _BARE_KEY.fullmatch(k) else _toml_value(k) for k in table}
    return [f"{keys[k]} = {_toml_value(v)}" for k, v in table.items() if v is not None]


def _toml_value(value: Any) -> str:
    match value:
        case dict():
            pairs = ", ".join(_toml_pairs(value))
            return f"{{ {pairs} }}" if pairs else "{}"
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case _:
            return json.dumps(value, ensure_ascii=False)  # TOML has no surrogate pairs
