"""Scores under one protocol compare; under two they are refused, with the fields that differ."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.errors import ConfigError, EvaluationError
from pipeline.extractors.naming import ARTIFACT
from pipeline.protocol import (
    FIELDS,
    compare_records,
    differences,
    differing_settings,
    make_protocol,
    own_sampling,
    read_record,
)


def record(value: float, low: float | None = None, high: float = 0.0, **protocol: Any) -> Any:
    interval = None if low is None else {"value": value, "low": low, "high": high}
    rest = dict.fromkeys(FIELDS)
    return rest | {
        "metric": "fid[classifier]",
        "value": value,
        "unbiased": interval,
        "protocol": {"num_samples": 512, "sampler": "ddim", "eta": 0.0, **protocol},
    }


def test_fields_that_differ_or_are_lacking_are_named() -> None:
    assert differences({"a": 1, "b": None}, {"a": 1, "b": None}) == []
    assert differences({"a": 1, "b": 2, "c": 0}, {"c": 0, "a": 2, "d": None}) == ["a", "b", "d"]


def test_one_that_is_told_labels_compares_with_one_that_is_not() -> None:
    assert differences({"a": 1, "label_mix": "m"}, {"a": 1}) == []
    assert differences({"a": 1}, {"a": 2, "label_mix": "m"}) == ["a"]
    assert differences({"label_mix": "m"}, {"label_mix": "n"}) == ["label_mix"]
    ours = {"eta": 0.0, "scoring": 1, "implementation": "1.9"}
    assert differing_settings(ours, {"eta": 1.0, "scoring": 2, "label_mix": "m"}) == ["eta"]


def test_the_protocol_says_what_guides_the_network_and_how_it_gets_its_labels(
    tiny_config: Path,
) -> None:
    def sampling(*overrides: str) -> dict[str, Any]:
        return own_sampling(load_config(tiny_config, ["evaluate.guidance_scale=3.0", *overrides]))

    told, untold = sampling("model.class_conditional=true"), sampling()
    assert (told["guidance_scale"], untold["guidance_scale"]) == (3, 1)
    assert differences(told, untold) == ["guidance_scale", "labels"]


def test_different_protocols_are_refused_with_their_fields_and_values() -> None:
    with pytest.raises(EvaluationError) as caught:
        compare_records(("a", "b"), [record(1.0), record(2.0, eta=0.5, num_samples=64)])
    assert (
        "a and b have different protocols and do not compare (num_samples: 512 and 64; eta: 0.0 "
        "and 0.5). Evaluate" in str(caught.value)
    )


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [(((3, 4), (1, 2)), True), (((1, 2), (3, 4)), False), (((1, 3), (2, 4)), False)],
)
def test_intervals_apart_on_the_side_of_the_scores_are_beyond_chance(
    intervals: Any, expected: bool
) -> None:
    (a, b), (c, d) = intervals
    found = compare_records(("a", "b"), [record(5.0, a, b), record(4.0, c, d)])
    assert (found.difference, found.is_beyond_chance) == (-1.0, expected)


def test_without_an_interval_nothing_is_said_of_chance() -> None:
    found = compare_records(("a", "b"), [record(5.0, 1, 2), record(4.0)])
    assert found.is_beyond_chance is None


def test_a_record_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    path.write_text(json.dumps(record(3.0)))
    assert read_record(str(path), "runs")["value"] == 3.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "it is not there"),
        ("{", "it is no JSON object"),
        ("[1]", "it is no JSON object"),
        ('{"value": 1}', "it is no record of a score"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str | None, fault: str) -> None:
    path = tmp_path / "score.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"score.json cannot be compared: {fault}"):
        read_record(str(path), "runs")


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no run 'x'"):
        read_record("x", str(tmp_path))


def test_a_config_whose_search_is_to_come_has_no_score_yet(
    tiny_config: Path, tmp_path: Path
) -> None:
    root = f"storage.root={tmp_path / 'runs'}"
    config = load_config(tiny_config, [root])
    planned = make_plan(config, ("evaluate",))
    step = planned.steps[-1]
    manifest = {"step": "evaluate", "key": step.key, "metrics": record(3.0), "seconds": 1.0}
    planned.storage.create(f"{step.directory}/manifest.json", json.dumps(manifest).encode())
    assert read_record(str(tiny_config), "", [root])["value"] == 3.0
    searching = [root, "tune.enabled=true", "tune.num_samples=64", "train.num_workers=1"]
    with pytest.raises(ConfigError, match="is not evaluated: its config is what tune recommends"):
        read_record(str(tiny_config), "", searching)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("evaluate.seed=1", "seed"),
        ("evaluate.num_steps=5", "num_steps"),
        ("evaluate.spacing=leading", "spacing"),
        ("evaluate.eta=0.5", "eta"),
        ("evaluate.clip_x_start=false", "clip_x_start"),
        ("evaluate.interval_reference=sample", "interval_reference"),
        ("data.resolution=16", "resolution"),
        ("data.mode=RGB", "mode"),
        ("data.resample=area", "resize"),
        ("data.fit=pad", "fit"),
    ],
)
def test_scores_under_another_setting_do_not_compare(
    tiny_config: Path, override: str, field: str
) -> None:
    features = {
        "metrics": {"extractor": "x", "num_features": 4}, "artifacts": {ARTIFACT: {"sha256": "0"}}
    }  # fmt: skip
    reference = {"key": "r", "metrics": {"counts": {"test": 40}}}
    plain, other = (
        make_protocol(
            load_config(tiny_config, settings), features, reference, split="test", num_samples=8
        )
        for settings in ([], [override])
    )
    assert differences(plain, other) == [field]
