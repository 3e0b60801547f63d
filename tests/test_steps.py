"""Golden outputs: when one changes, the step's version in `pipeline/steps.py` must be raised.

Each was recorded from the code of the version named beside it, on inputs fixed here. A change
that is meant gets a higher version and a new value; one that is not meant is a bug.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.extractors.small import SmallNetwork
from pipeline.models import make_unet
from pipeline.order import sample_ids
from pipeline.sampling import sample_items
from pipeline.sources import InputShard, list_inputs
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage
from pipeline.subject_kinds import GivenImages, GivenModel, Rescored, Subject
from pipeline.train import train_in_process
from pipeline.units import UNIT_VERSION, unit_key
from pipeline.workflow import Resources, Step, plan

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"


def test_versions_are_those_of_the_golden_outputs(tiny_config: Path) -> None:
    steps = make_steps(load_config(tiny_config), [])
    assert UNIT_VERSION == 5
    assert {step.name: step.version for step in steps} == {
        "preprocess": 5,
        "features": 2,
        "reference": 3,
        "train": 3,
        "tune": 3,
        "evaluate": 5,
        "promote": 3,
        "report": 1,
    }


def test_only_what_is_told_the_class_is_scored_anew(tiny_config: Path) -> None:
    def version(*overrides: str, subject: Subject | None = None) -> int:
        steps = make_steps(load_config(tiny_config, list(overrides)), [], subject=subject)
        return next(step.version for step in steps if step.name == "evaluate")

    told = "model.class_conditional=true"
    assert (version(), version(told)) == (5, 7)
    assert version(told, subject=GivenModel("a")) == 5
    assert version(subject=GivenModel("a", class_conditional=True)) == 7
    assert version(told, subject=GivenImages(("x",), ())) == 5
    assert version(told, subject=Rescored(())) == 7


def test_the_default_for_what_cannot_be_checked_changes_no_key(tiny_config: Path) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        steps = make_steps(load_config(tiny_config, list(overrides)), [])
        return next(dict(step.settings) for step in steps if step.name == "promote")

    assert "promote.unchecked_copies" not in settings()
    allowed = settings("promote.unchecked_copies=allow")
    assert allowed == settings() | {"promote.unchecked_copies": "allow"}


def test_how_shards_are_read_changes_no_data_set(tiny_config: Path) -> None:
    def made(*overrides: str) -> tuple[dict[str, Any], str]:
        config = load_config(tiny_config, list(overrides))
        settings = {step.name: dict(step.settings) for step in make_steps(config, [])}
        return settings, unit_key(InputShard("a.tar", "tar", ()), config.data)

    plain, unit = made()
    assert made("data.cache_bytes=1000") == (plain, unit)
    assert "shuffle_window" not in str(plain)  # keys from before there was one hold
    windowed, same_unit = made("data.shuffle_window=64")
    assert same_unit == unit
    assert {name for name in plain if plain[name] != windowed[name]} == {
        "features",
        "train",
        "tune",
    }
    assert windowed["train"] == plain["train"] | {"data.shuffle_window": 64}


def test_an_elastic_training_runs_alone_and_continues_a_fixed_one(tiny_config: Path) -> None:
    def train_step(workers: str) -> Step:
        config = load_config(tiny_config, [f"train.num_workers={workers}"])
        return next(step for step in make_steps(config, []) if step.name == "train")

    assert train_step("[1, 2]").resources == train_step("2").resources == Resources(cpus=2)
    assert train_step("[1, 2]").settings == train_step("1").settings


@pytest.mark.parametrize(
    "override", ["num_workers=1", "accumulation_steps=2", "use_gpu=true", "compile=true"]
)
def test_what_has_dropout_draw_others_is_learned_with_dropout_alone(
    tiny_config: Path, override: str
) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        steps = make_steps(load_config(tiny_config, list(overrides)), [])
        return dict(next(step.settings for step in steps if step.name == "train"))

    override = f"train.{override}"
    assert settings(override) == settings()
    dropout = "model.dropout=0.1"
    assert settings(override, dropout) != settings(dropout)


def test_scores_beside_training_come_after_their_reference_and_change_no_key(
    tiny_config: Path,
) -> None:
    def made(*overrides: str) -> Step:
        steps = make_steps(load_config(tiny_config, list(overrides)), [])
        return next(step for step in steps if step.name == "train")

    plain, scored = made(), made("train.fid_every=10", "train.fid_samples=100")
    assert scored.settings == plain.settings
    assert (scored.inputs, scored.after) == (plain.inputs, ("features", "reference"))
    assert (plain.after, plain.resources.cpus + 1) == ((), scored.resources.cpus)


def test_an_extractor_that_learns_nothing_from_the_data_outlives_them(tiny_config: Path) -> None:
    def made(*overrides: str) -> Step:
        config = load_config(tiny_config, ["evaluate.num_samples=20480", *overrides])
        steps = make_steps(config, [], {"features.weights": "w"})
        return next(step for step in steps if step.name == "features")

    width = "features.width=4"
    for learns in ("classifier", "self_supervised"):
        plain = made(f"features.extractor={learns}", width)
        assert (plain.inputs, plain.after) == (("preprocess",), ())
        assert "features.weights" not in plain.settings
        windowed = made(f"features.extractor={learns}", width, "data.shuffle_window=64")
        assert windowed.settings == {**plain.settings, "data.shuffle_window": 64}
    inception = made("features.extractor=inception", "features.width=64")
    assert (inception.inputs, inception.after) == ((), ("preprocess",))
    assert dict(inception.settings) == {
        "features.extractor": "inception", "features.width": 64, "features.weights": "w",
        "data.shape": [1, 8, 8],
    }  # fmt: skip
    same = made("features.extractor=inception", "features.width=64", "features.num_steps=9")
    assert same == inception
    own, other = (made("features.extractor=a.b:c", width, f"features.seed={k}") for k in (0, 1))
    assert own.settings != other.settings
    assert made("features.extractor=inception", "features.width=2048") == made(
        "features.extractor=inception", "features.width=2048", "data.shuffle_window=64"
    )


def test_preprocess(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config)
    storage = LocalStorage(str(tmp_path))
    manifest = preprocess_shard(list_inputs(config.data, storage).shards[0], config.data, storage)
    assert {file["split"]: file["sha256"][:16] for file in manifest["files"]} == GOLDEN_SHARD


def test_train_and_evaluate(
    tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> None:
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.integers(0, 256, (1, 8, 8), np.uint8) for _ in range(64)])
    data = write_data_set(LocalStorage(str(tmp_path)), pixels)
    config = load_config(tiny_config, ["train.num_steps=10", "train.checkpoint_every=5"])
    storage = LocalStorage(str(tmp_path))
    train_in_process(config, storage, "t", data)
    checkpoint = CheckpointStore(storage, "t").load(10)
    assert checkpoint is not None
    losses = [entry["loss"] for entry in checkpoint.history]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-4)
    model = make_unet(config, config.train.seed)
    model.load_state_dict(dict(checkpoint.ema))
    samples = sample_items(config, model, range(4))
    assert samples.flatten(1).mean(1).tolist() == pytest.approx(GOLDEN_MEANS, abs=1e-4)


def test_features_keep_their_shape_and_order() -> None:
    parameters = {name: list(p.shape) for name, p in SmallNetwork(1, 4, 10).named_parameters()}
    digest = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:16]
    order = sample_ids(0, np.arange(8), 100).tolist()
    assert (digest, order) == (GOLDEN_CLASSIFIER, GOLDEN_ORDER)


GOLDEN_SHARD = {
    "train": "8f159df0881fb7f3",
    "validation": "abfb87d5359ce409",
    "test": "832a78636cc6f39e",
}
GOLDEN_LOSSES = [0.679362, 0.651339]
GOLDEN_MEANS = [0.0869361, -0.1757602, -0.0103778, 0.0637329]
GOLDEN_CLASSIFIER = "52b1aa5cc5f7b078"
GOLDEN_ORDER = [97, 62, 86, 35, 93, 98, 45, 13]


@pytest.mark.parametrize(
    "override", ["num_steps=9", "batch_size=9", "learning_rate=0.5", "seed=9", "width=5"]
)
def test_each_setting_of_a_trained_extractor_makes_another(
    tiny_config: Path, override: str
) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        steps = make_steps(load_config(tiny_config, list(overrides)), [])
        return next(dict(step.settings) for step in steps if step.name == "features")

    assert settings(f"features.{override}") != settings()


@pytest.mark.parametrize(("decay", "continues"), [("constant", True), ("cosine", False)])
def test_a_longer_training_continues_unless_its_rate_ends_elsewhere(
    tiny_config: Path, tmp_path: Path, decay: str, continues: bool
) -> None:
    def series(num_steps: int) -> str:
        settings = [f"train.learning_rate_decay={decay}", f"train.num_steps={num_steps}"]
        steps = make_steps(load_config(tiny_config, settings), [])
        planned = {p.step.name: p for p in plan(steps, LocalStorage(str(tmp_path)))}
        return planned["train"].series

    assert (series(300) == series(600)) is continues


def test_near_copies_of_a_given_model_are_those_among_what_was_trained_on(
    tiny_config: Path,
) -> None:
    def settings(flip: str, subject: Subject) -> dict[str, Any]:
        config = load_config(tiny_config, [f"train.horizontal_flip={flip}"])
        steps = make_steps(config, [], subject=subject)
        return next(dict(step.settings) for step in steps if step.name == "evaluate")

    for subject in (GivenModel("a"), GivenImages(("x",), ())):
        assert settings("true", subject) != settings("false", subject)
