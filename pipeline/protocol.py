"""The protocol of a score: all that it depends on but the network. Equal ones can be compared.

A record is a score with its protocol, as the step `evaluate` makes it and keeps it in `score.json`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from diffusion_core import CHUNK
from pipeline.config import command_line, load_config
from pipeline.driver import make_plan
from pipeline.errors import ConfigError, EvaluationError
from pipeline.extractors.naming import ARTIFACT
from pipeline.runs import read_run
from pipeline.settings import Config
from pipeline.storage import open_storage
from pipeline.workflow import read_manifest

RECORD = "score.json"
FIELDS = {"metric", "value", "floor", "ceiling", "unbiased", "kid", "inception_score",
          "precision_recall", "degenerate", "copies", "sweeps", "protocol"}  # fmt: skip
SCORING = 1  # raised by hand when a score of the same features comes out otherwise
MIX = "label_mix"  # of networks that are told the class; others have a mix of their own making
LABELS = {"labels": "drawn independently"}  # of such networks; see `draw_labels`
OF_THE_PROGRAM = ("implementation", "scoring", MIX)  # fields that no setting determines
OF_IMAGES = {"sampler": "none: the images were given"}


def make_protocol(
    config: Config,
    features: Mapping[str, Any],
    reference: Mapping[str, Any],
    *,
    split: str,
    num_samples: int,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that a score depends on but the network.

    Args:
        config: the whole config.
        features: the manifest of that step.
        reference: the manifest of that step.
        split: whose images are the reference.
        num_samples: that are scored.
        sampling: how they are made; of the config's own training when not given.
    """
    data = config.data
    return {
        "reference": reference["key"],
        "reference_split": split,
        "reference_count": reference["metrics"]["counts"][split],
        "extractor": features["metrics"]["extractor"],
        "extractor_sha256": features["artifacts"][ARTIFACT]["sha256"],
        "feature_width": features["metrics"]["num_features"],
        "num_samples": num_samples,
        **(sampling or own_sampling(config)),
        **({"shape": list(data.shape)} if data.is_sequence else _of_images(config)),
        "interval_reference": config.evaluate.interval_reference,
        "implementation": f"torchmetrics {version('torchmetrics')}",
        "scoring": SCORING,
    }


def own_sampling(config: Config) -> dict[str, Any]:
    """How samples are drawn from a network of the config's own training."""
    is_told = config.model.class_conditional
    return sampling_protocol(config, is_told=is_told) | (LABELS if is_told else {})


def sampling_protocol(config: Config, *, is_told: bool, weights: str = "ema") -> dict[str, Any]:
    """How samples are drawn from a network, but for their labels.

    Args:
        config: the settings of `evaluate`.
        is_told: whether the network is told the class; others are not guided.
        weights: `ema`, or `model` where a checkpoint has no others. How wide the average is belongs
            to the network: who trains with another may compare.
    """
    settings = config.evaluate
    return {
        "seed": settings.seed,
        "chunk": CHUNK,
        "weights": weights,
        "sampler": "ddim",
        "num_steps": settings.num_steps,
        "spacing": settings.spacing,
        "eta": settings.eta,
        "clip_x_start": settings.clip_x_start,
        "guidance_scale": settings.guidance_scale if is_told else 1.0,
    }


def _of_images(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "resolution": data.resolution,
        "mode": data.mode,
        "resize": data.resample,
        "fit": data.fit,
    }


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ; a field that one lacks is one of them.

    But for the mix of labels: a network that is told them may stand beside one that is not.
    """
    names = [*ours, *(name for name in theirs if name not in ours)]
    if (MIX in ours) != (MIX in theirs):
        names.remove(MIX)
    absent = object()
    return [name for name in names if ours.get(name, absent) != theirs.get(name, absent)]


def differing_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, but for those that the program determines."""
    return [name for name in differences(ours, theirs) if name not in OF_THE_PROGRAM]


@dataclass(frozen=True)
class Comparison:
    """Two scores of one protocol, the difference, and whether it is beyond chance."""

    names: tuple[str, str]
    records: tuple[Mapping[str, Any], Mapping[str, Any]]
    difference: float  # of the second to the first; below 0: the second is better
    is_beyond_chance: bool | None  # whether the intervals lie apart; None where there are none


def compare_records(names: tuple[str, str], records: Sequence[Mapping[str, Any]]) -> Comparison:
    """Puts two records side by side.

    Args:
        names: of the two, for people.
        records: of the two.

    Raises:
        EvaluationError: they have different protocols; it names the fields and their values.
    """
    first, second = records
    if differing := differences(first["protocol"], second["protocol"]):
        values = "; ".join(
            f"{name}: {_shown(first['protocol'].get(name))} and "
            f"{_shown(second['protocol'].get(name))}"
            for name in differing
        )
        raise EvaluationError(
            f"The scores of {names[0]} and {names[1]} have different protocols and do not compare "
            f"({values}). Evaluate one of them again with the settings of the other."
        )
    ours, theirs = (record.get("unbiased") for record in records)
    is_apart = None
    difference = second["value"] - first["value"]
    if ours and theirs:  # and on the side that the scores themselves are on
        below = theirs if difference < 0 else ours
        above = ours if difference < 0 else theirs
        is_apart = below["high"] < above["low"]
    return Comparison(names, (first, second), difference, is_apart)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f'{text[:17].rstrip()}..."'


def read_record(target: str, root: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a score.

    Args:
        target: a config (`.toml`) that is evaluated, a file `score-<hash>.json` by path or URI, or
            the name of a run.
        root: the storage root of a run's name.
        overrides: `a.b=c` of a config.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    if target.endswith(".json"):
        return _read_file(target)
    if target.endswith(".toml"):
        planned = make_plan(load_config(target, overrides), ("evaluate",), read_remote=False)
        step = planned.steps[-1]
        manifest = None  # nor is it known what a search that is to come will recommend
        if step.action == "cached":
            manifest = read_manifest(planned.storage, "evaluate", step.key)
        if manifest is None:
            command = command_line("evaluate", target, overrides)
            raise ConfigError(
                f"{target} is not evaluated: {step.reason}. Run `raydiffusion {command}`."
            )
        return _checked(manifest["metrics"], target)
    storage = open_storage(root)
    directory = read_run(storage, target)["directories"].get("evaluate")
    manifest = None
    if directory is not None:
        manifest = read_manifest(storage, "evaluate", directory.rsplit("/", 1)[-1])
    if manifest is None:
        raise ConfigError(f"The run {target} has no score. Evaluate it, or name another run.")
    return _checked(manifest["metrics"], target)


def _checked(record: dict[str, Any], target: str) -> dict[str, Any]:
    if not record.keys() >= FIELDS:
        raise ConfigError(
            f"The score of {target} was made by an earlier version, which computed less. Evaluate "
            "it again."
        )
    return record


def _read_file(target: str) -> dict[str, Any]:
    directory, _, name = target.rpartition("/")
    try:
        record = json.loads(open_storage(directory or ".").read(name))
        if record.keys() >= FIELDS:
            return record
        fault = "it is no record of a score of this version"
    except FileNotFoundError:
        fault = "it is not there"
    except (ValueError, AttributeError) as error:
        fault = f"it is no JSON object ({error})"
    raise ConfigError(
        f"{target} cannot be compared: {fault}. Give a file score-*.json, a config or a run."
    )
