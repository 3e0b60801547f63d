"""The step `evaluate`: samples from the EMA weights, and all their scores with the protocol.

Beside the score stand a floor (real training images) and a ceiling (an untrained network), with the
same reference and the same number of images. What is evaluated may be another model, or images; see
`subjects.py`. How samples are drawn is in `drawing.py`, what is drawn for the eye in `pictures.py`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline.copy_search import find_copies
from pipeline.drawing import Series, chunk_directory, draw, read_all
from pipeline.errors import EvaluationError
from pipeline.extractors import score_name
from pipeline.features import SAMPLES_PER_FEATURE, check_counts
from pipeline.gallery import Gallery, look_through
from pipeline.loader import keyed_seed
from pipeline.pictures import draw_pictures
from pipeline.protocol import RECORD, make_protocol
from pipeline.reference import pick_features, read_features, read_sums
from pipeline.scores import show_number
from pipeline.scores.frechet import FeatureSums, frechet_distance, sum_features
from pipeline.scores.inception_score import inception_score
from pipeline.scores.interval import LEVEL, unbiased_distance
from pipeline.scores.kernel import kernel_distance
from pipeline.scores.manifold import precision_recall
from pipeline.settings import Config
from pipeline.subjects import Source, find_source, sampling_of
from pipeline.workflow import StepContext

REFERENCE_SPLIT = "test"
SWEPT: dict[str, tuple[float, ...]] = {
    "num_steps": (5, 10, 20, 50, 100),
    "eta": (0.0, 0.25, 0.5, 0.75, 1.0),
}


def evaluate(context: StepContext) -> dict[str, Any]:
    """Samples, scores, and writes the record, the samples and the pictures of the report.

    Raises:
        DataError: fewer training images than samples, so that the floor would not be comparable.
        EvaluationError: samples or their features that are not finite.
        ClusterError: Ray lost the work.
    """
    config = context.config
    source = find_source(context)
    series = plan_series(config, source)
    check_counts(
        config,
        context.inputs["preprocess"]["metrics"]["counts"],
        context.inputs["features"]["metrics"]["num_features"],
        series["samples"].num_samples if source.kind == "images" else None,
    )
    if source.kind != "images" and source.counts is None and config.evaluate.guidance_scale != 1:
        context.note("evaluate.guidance_scale is left out: the network is not told the class")
    draw(context, list(series.values()))
    seen = look_through(context, series["samples"])
    copies = find_copies(context, seen)
    score = _score(context, series, seen) | {"copies": copies and copies.facts()}
    context.write_artifact(RECORD, json.dumps(score, indent=1).encode())
    pictures = draw_pictures(context, source, seen, copies)
    context.write_artifact("pictures.safetensors", safetensors.numpy.save(pictures))
    context.scratch.append(chunk_directory(context.directory))
    context.note(summarise(score))
    return score


def plan_series(config: Config, source: Source) -> dict[str, Series]:
    """What is drawn, by name: the samples, those of an untrained network, and the sweeps."""
    settings = config.evaluate
    if source.kind == "images":
        assert source.manifest is not None
        count = source.manifest["metrics"]["counts"]["train"]
        return {"samples": Series("samples", source, settings, count)}
    series = {"samples": Series("samples", source, settings, settings.num_samples)}
    if source.kind == "training":
        untrained = Source("untrained", counts=source.counts)
        series["untrained"] = Series("untrained", untrained, settings, settings.num_samples)
    if settings.sweep_samples is None:
        return series
    for name, values in SWEPT.items():
        for value in values:
            if value <= source.num_timesteps:
                changed = settings.model_copy(update={name: value})
                key = f"{name}-{value}"
                series[key] = Series(key, source, changed, settings.sweep_samples)
    return series


def _score(context: StepContext, series: Mapping[str, Series], seen: Gallery) -> dict[str, Any]:
    config, settings = context.config, context.config.evaluate
    features, reference = context.inputs["features"], context.inputs["reference"]
    sums = read_sums(context.read_input("reference", "sums.safetensors"), REFERENCE_SPLIT)
    real = read_features(context.storage, reference, REFERENCE_SPLIT)
    generated = read_all(context, series["samples"], "features")

    def distance(found: np.ndarray) -> float:
        value = frechet_distance(sums, sum_features(found))
        if not np.isfinite(value):
            raise EvaluationError(
                "The score is not finite: the features of the samples are too large. Evaluate "
                "another checkpoint, or train again with a lower train.learning_rate."
            )
        return value

    order = np.random.Generator(np.random.Philox(key=keyed_seed("floor", settings.seed)))
    chosen = order.permutation(reference["metrics"]["counts"]["train"])[: len(generated)]
    floor = pick_features(context.storage, reference, "train", chosen)
    is_fixed = settings.interval_reference == "fixed"
    few = few_samples(min(len(generated), sums.count), generated.shape[1])
    found = precision_recall(real, generated)
    record = {
        "metric": score_name("fid", features) + few,
        "value": distance(generated),
        "floor": distance(floor),
        "ceiling": None,
        "unbiased": _interval(
            score_name("fid_unbiased", features), sums if is_fixed else real, generated
        ),
        "kid": _kid(score_name("kid", features), real, generated),
        "inception_score": None,
        "precision_recall": found
        and {
            "metrics": [score_name(name, features) for name in ("precision", "recall")],
            **asdict(found),
        },
        "degenerate": asdict(seen.degenerate),
        "sweeps": None,
        "protocol": make_protocol(
            config,
            features,
            reference,
            split=REFERENCE_SPLIT,
            num_samples=len(generated),
            sampling=sampling_of(context),
        ),
    }
    if (count := settings.sweep_samples) is not None and len(series) > 1:
        few_swept = few_samples(min(count, sums.count), generated.shape[1])
        record["sweeps"] = {
            "metric": score_name("fid", features) + few_swept,
            "num_samples": count,
            "values": _sweeps(series, lambda s: distance(read_all(context, s, "features"))),
        }
    if "untrained" in series:
        record["ceiling"] = distance(read_all(context, series["untrained"], "features"))
    if features["metrics"]["classifies"]:
        logits = read_all(context, series["samples"], "logits")
        name = score_name("inception_score", features) + few
        record["inception_score"] = {"metric": name, "value": inception_score(logits)}
    return record


def few_samples(count: int, num_features: int) -> str:
    """What the name of a score says where there are too few samples; empty where there are not.

    Args:
        count: of the samples, or of the test images where those are fewer.
        num_features: of each.
    """
    if count <= num_features:
        return f" (rank-deficient: {count} for {num_features} features)"
    if count < SAMPLES_PER_FEATURE * num_features:
        return f" (few: {count} for {num_features} features)"
    return ""


def summarise(score: Mapping[str, Any]) -> str:
    """A score in one line, with what must not be overlooked."""
    text = f"{score['metric']} {show_number(score['value'])} (floor {show_number(score['floor'])}"
    if score["ceiling"] is not None:
        text += f", ceiling {show_number(score['ceiling'])}"
    text += ")"
    if (interval := score["unbiased"]) is not None:
        ends = f"{show_number(interval['low'])}, {show_number(interval['high'])}"
        text += f"; without bias {show_number(interval['value'])} [{ends}]"
    broken = score["degenerate"]
    if broken["constant"]:
        text += f"; {broken['constant']:,} of {broken['count']:,} samples are of one value"
    if score["copies"] is not None and score["copies"]["is_memorising"]:
        text += f"; MEMORISES: {score['copies']['share']:.1%} of the samples are near-copies"
    return text


def _interval(
    name: str, reference: np.ndarray | FeatureSums, generated: np.ndarray
) -> dict[str, Any] | None:
    found = unbiased_distance(reference, generated)
    return None if found is None else {"metric": name, **asdict(found), "level": LEVEL}


def _kid(name: str, real: np.ndarray, generated: np.ndarray) -> dict[str, Any] | None:
    found = kernel_distance(real, generated)
    return None if found is None else {"metric": name, **asdict(found)}


def _sweeps(
    series: Mapping[str, Series], distance: Callable[[Series], float]
) -> dict[str, list[tuple[float, float]]]:
    """By setting: its values and the score of each."""
    sweeps: dict[str, list[tuple[float, float]]] = {}
    for key, one in series.items():
        name, _, _ = key.partition("-")
        if name in SWEPT:
            sweeps.setdefault(name, []).append((getattr(one.settings, name), distance(one)))
    return sweeps
