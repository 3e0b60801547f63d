"""What is drawn for a score, and what a score's name and line say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.drawing import Series
from pipeline.errors import DataError
from pipeline.evaluate import _score, evaluate, few_samples, plan_series, summarise
from pipeline.features import check_counts
from pipeline.scores import show_number
from pipeline.scores.degenerate import DegenerateCounts
from pipeline.scores.frechet import frechet_distance, sum_features
from pipeline.scores.kernel import kernel_distance
from pipeline.scores.manifold import precision_recall
from pipeline.subjects import Source

RECORD: dict[str, Any] = {
    "metric": "fid[classifier]", "value": 51.694, "floor": 0.02311, "ceiling": 216.76,
    "unbiased": {"value": 49.15, "low": 38.01, "high": 60.28, "level": 0.95},
    "degenerate": {"count": 128, "constant": 0, "black": 0}, "copies": None,
}  # fmt: skip


def test_what_is_drawn_depends_on_what_is_evaluated(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["evaluate.sweep_samples=64"])
    training = plan_series(config, Source("training", num_timesteps=100))
    sweeps = [name for name in training if name not in ("samples", "untrained")]
    assert sweeps == [
        "num_steps-5", "num_steps-10", "num_steps-20", "num_steps-50", "num_steps-100",
        "eta-0.0", "eta-0.25", "eta-0.5", "eta-0.75", "eta-1.0",
    ]  # fmt: skip
    assert training["samples"].num_samples == training["untrained"].num_samples == 128
    assert training["eta-0.5"].settings.eta == 0.5
    assert training["eta-0.5"].settings.num_steps == config.evaluate.num_steps
    assert list(plan_series(config, Source("model", key="x", num_timesteps=100))) == [
        "samples",
        *sweeps,
    ]
    images = Source("images", manifest={"metrics": {"counts": {"train": 70}}})
    assert {name: s.num_samples for name, s in plan_series(config, images).items()} == {
        "samples": 70
    }


class DrawnError(Exception):
    """In place of samples."""


@pytest.mark.parametrize(
    ("counts", "scale", "is_noted"), [(None, 3.0, True), (None, 1.0, False), ({"0": 1}, 3.0, False)]
)
def test_guidance_of_a_network_that_is_not_told_the_class_is_noted(
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: dict[str, int] | None,
    scale: float,
    is_noted: bool,
) -> None:
    def draw(*_: Any) -> None:
        raise DrawnError

    notes: list[str] = []
    config = load_config(tiny_config, [f"evaluate.guidance_scale={scale}"])
    inputs = {
        "preprocess": {"metrics": {"counts": {}}},
        "features": {"metrics": {"num_features": 4}},
    }
    context: Any = SimpleNamespace(config=config, inputs=inputs, note=notes.append)
    source = Source("model", key="x", counts=counts, num_timesteps=100)
    monkeypatch.setattr("pipeline.evaluate.find_source", lambda _: source)
    monkeypatch.setattr("pipeline.evaluate.check_counts", lambda *_: None)
    monkeypatch.setattr("pipeline.evaluate.draw", draw)
    with pytest.raises(DrawnError):
        evaluate(context)
    assert len(notes) == is_noted


def test_more_steps_than_there_are_timesteps_are_not_tried(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["evaluate.sweep_samples=64"])
    names = plan_series(config, Source("model", key="x", num_timesteps=20))
    assert [name for name in names if name.startswith("num_steps")] == [
        "num_steps-5",
        "num_steps-10",
        "num_steps-20",
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (160, ""),
        (159, " (few: 159 for 16 features)"),
        (17, " (few: 17 for 16 features)"),
        (16, " (rank-deficient: 16 for 16 features)"),
    ],
)
def test_the_name_says_where_there_are_few_samples(count: int, expected: str) -> None:
    assert few_samples(count, 16) == expected


def test_few_are_refused_unless_they_are_allowed(tiny_config: Path) -> None:
    counts = {"train": 900, "validation": 90, "test": 30}
    with pytest.raises(DataError, match=r"needs 10 x features.width = 40 test images"):
        check_counts(load_config(tiny_config), counts)
    allowed = load_config(
        tiny_config, ["evaluate.allow_few_samples=true", "evaluate.num_samples=20"]
    )
    check_counts(allowed, counts)
    with pytest.raises(DataError, match="needs two samples and two test images at least"):
        check_counts(allowed, counts, num_samples=1)
    with pytest.raises(DataError, match=r"as many training images as there are samples, 901,"):
        check_counts(allowed, counts, num_samples=901)
    check_counts(allowed, counts, num_samples=900)
    check_counts(load_config(tiny_config), counts | {"test": 40}, num_samples=40)
    with pytest.raises(DataError, match="in 64 features needs 640 samples, and there are 128"):
        check_counts(load_config(tiny_config), counts | {"test": 999}, num_features=64)


def test_a_score_in_one_line() -> None:
    assert summarise(RECORD) == (
        "fid[classifier] 51.69 (floor 0.0231, ceiling 216.76); without bias 49.15 [38.01, 60.28]"
    )
    broken = {"count": 128, "constant": 5, "black": 2}
    bad = RECORD | {"ceiling": None, "unbiased": None, "degenerate": broken,
                    "copies": {"is_memorising": True, "share": 0.061}}  # fmt: skip
    assert summarise(bad) == (
        "fid[classifier] 51.69 (floor 0.0231); 5 of 128 samples are of one value; "
        "MEMORISES: 6.1% of the samples are near-copies"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(51.694, "51.69"), (1.0, "1.00"), (0.02311, "0.0231"), (-0.5, "-0.5")]
)
def test_numbers_as_a_person_reads_them(value: float, text: str) -> None:
    assert show_number(value) == text


@pytest.mark.parametrize("interval_reference", ["fixed", "sample"])
def test_a_record_tells_samples_from_images_and_the_floor_is_of_as_many(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, interval_reference: str
) -> None:
    rng = np.random.default_rng(0)
    train, real = rng.normal(size=(400, 4)), rng.normal(size=(150, 4))
    generated = 0.3 * rng.normal(size=(200, 4))  # precise, and of little variety
    picked: list[np.ndarray] = []

    def pick(storage: Any, reference: Any, split: str, numbers: np.ndarray) -> np.ndarray:
        assert split == "train"
        picked.append(numbers)
        return train[numbers]

    for name, replaced in {
        "read_sums": lambda content, split: sum_features(real),
        "read_features": lambda storage, reference, split: real,
        "read_all": lambda context, series, name: generated,
        "pick_features": pick,
        "sampling_of": lambda context: {},
        "make_protocol": lambda *_, **fields: fields,
    }.items():
        monkeypatch.setattr(f"pipeline.evaluate.{name}", replaced)
    config = load_config(tiny_config, [f"evaluate.interval_reference={interval_reference}"])
    facts = {"extractor": "classifier", "num_features": 4, "classifies": False}
    inputs = {"features": {"metrics": facts}, "reference": {"metrics": {"counts": {"train": 400}}}}
    context: Any = SimpleNamespace(
        config=config, inputs=inputs, storage=None, read_input=lambda step, name: b""
    )
    series = {"samples": Series("samples", Source("model"), config.evaluate, 200)}
    seen: Any = SimpleNamespace(degenerate=DegenerateCounts(200, 0, 0))
    record = _score(context, series, seen)
    manifold, kernel = precision_recall(real, generated), kernel_distance(real, generated)
    assert manifold is not None
    assert kernel is not None
    assert manifold.precision > 0.9 > 0.5 > manifold.recall
    found = record["precision_recall"]
    assert (found["precision"], found["recall"]) == (manifold.precision, manifold.recall)
    assert record["kid"]["generated_count"] == 200
    assert record["kid"]["error"] == kernel.error
    assert record["unbiased"]["is_reference_fixed"] == (interval_reference == "fixed")
    (numbers,) = picked
    assert len(set(numbers.tolist())) == len(numbers) == 200
    assert record["floor"] == pytest.approx(
        frechet_distance(sum_features(real), sum_features(train[numbers]))
    )
    assert record["metric"] == "fid[classifier]"
    monkeypatch.setattr("pipeline.evaluate.read_sums", lambda *_: sum_features(real[:30]))
    few = _score(context, series, seen)["metric"]
    assert few == "fid[classifier] (few: 30 for 4 features)"
