"""One trial without Ray: scored at its rungs, killed and continued, and found again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.settings import Config
from pipeline.storage import LocalStorage
from pipeline.tune import trial
from pipeline.tune.records import Rung, TrialStore
from pipeline.tune.trial import grace_steps, run_trial, rung_steps, trial_config, trial_key

SETTINGS = [
    "train.num_workers=1", "train.num_steps=60", "train.global_batch_size=16",
    "tune.train_steps=18", "tune.metric=bits_per_dim", "tune.num_samples=8",
    "diffusion.num_train_timesteps=8", "evaluate.num_steps=4", "tune.max_signal_left=0.5",
    "train.checkpoint_every=4",
]  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing of the project catches it."""


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(tiny_config, SETTINGS)


@pytest.fixture
def inputs(tmp_path: Path, write_data_set: Callable[..., Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    items = rng.integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    data = write_data_set(LocalStorage(str(tmp_path)), items, num_validation=16)
    return {"preprocess": data, "features": {"key": "f"}, "reference": {"key": "r"}}


def test_rungs_are_spaced_by_the_factor_and_end_with_the_trial(tiny_config: Path) -> None:
    def rungs(*overrides: str) -> list[int]:
        return rung_steps(load_config(tiny_config, [*SETTINGS, *overrides]))

    assert rungs() == [2, 6, 18]
    assert rungs("tune.grace_images=64") == [4, 18]  # 12 would leave less than a third to train
    assert rungs("tune.reduction_factor=2") == [4, 8, 18]
    assert rungs("tune.train_steps=1000") == [111, 333, 1000]
    assert rungs("tune.stopping=none") == [18]
    assert grace_steps(load_config(tiny_config, SETTINGS)) == 2


@pytest.mark.parametrize("steps", [18, 30, 1000, 1500, 2000, 10_000])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_rungs_save_work_and_checkpoints_stay_few(
    tiny_config: Path, steps: int, factor: int
) -> None:
    more = [f"tune.train_steps={steps}", f"tune.reduction_factor={factor}"]
    config = load_config(tiny_config, [*SETTINGS, "train.checkpoint_every=500", *more])
    *early, last = rung_steps(config)
    assert last == steps
    assert all(rung * factor <= steps for rung in early)
    assert trial_config(config, []).train.checkpoint_every == min(500, early[-1])


def test_a_trial_is_keyed_by_what_it_learns_not_by_how_it_is_run(
    config: Config, inputs: dict[str, Any], tiny_config: Path
) -> None:
    key = trial_key(trial_config(config, []), inputs)
    same = load_config(tiny_config, [*SETTINGS, "tune.num_trials=99", "train.checkpoint_every=7"])
    assert trial_key(trial_config(same, []), inputs) == key
    for override in ("diffusion.schedule=linear", "train.seed=1", "train.learning_rate=0.5"):
        assert trial_key(trial_config(config, [override]), inputs) != key
    assert trial_key(trial_config(config, []), inputs | {"preprocess": {"key": "other"}}) != key


def test_a_killed_trial_continues_and_scores_as_if_it_had_not_been(
    config: Config, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, rungs = LocalStorage(str(tmp_path)), rung_steps(config)
    resolved = trial_config(config, ["diffusion.schedule=cosine"])
    directory = f"steps/trial/{trial_key(resolved, inputs)}"

    def kill_at_second(rung: Rung, has_passed: bool) -> None:
        assert not has_passed
        if rung.step == rungs[1]:
            raise Killed

    with pytest.raises(Killed):
        run_trial(resolved, storage, inputs, rungs, kill_at_second)
    store = TrialStore(storage, directory)
    first = store.rungs()
    assert [rung.step for rung in first] == rungs[:2]
    assert not store.is_finished
    assert CheckpointStore(storage, directory).steps()

    first_steps: list[int] = []
    train = trial.train_in_process

    def watched(*arguments: Any, **options: Any) -> Any:
        checkpoints = CheckpointStore(storage, directory)
        first_steps.append(max(checkpoints.steps()))
        return train(*arguments, **options)

    monkeypatch.setattr(trial, "train_in_process", watched)
    told: list[Rung] = []
    passed: list[bool] = []

    def note(rung: Rung, has_passed: bool) -> None:
        told.append(rung)
        passed.append(has_passed)

    run_trial(resolved, storage, inputs, rungs, note)
    assert first_steps == [4]  # rung 6 was scored, and no checkpoint came after it
    assert [rung.step for rung in told] == rungs
    assert [rung.images_seen for rung in told] == [16 * step for step in rungs]
    assert passed == [True, False, False]
    assert told[:2] == first  # scores that were made are not made again
    assert store.is_finished
    for rung in told:  # a score by the bound needs no samples: those shown are drawn for it
        samples = store.read_samples(rung.step)
        assert samples is not None
        assert safetensors.numpy.load(samples)["items"].shape == (32, 1, 8, 8)

    again: list[tuple[Rung, bool]] = []
    monkeypatch.setattr(trial, "train_in_process", None)  # nothing is trained
    run_trial(resolved, storage, inputs, rungs, lambda *told: again.append(told))
    assert again == list(zip(told, [True, True, False], strict=True))

    storage.delete(f"{directory}/manifest.json")  # killed between the last score and this
    again.clear()
    run_trial(resolved, storage, inputs, rungs, lambda *told: again.append(told))
    assert [rung for rung, _ in again] == told
    assert store.is_finished

    again.clear()  # another experiment scores the same trial at other steps
    run_trial(resolved, storage, inputs, [2, 18], lambda *told: again.append(told))
    assert [rung.step for rung, _ in again] == [2, 18]

    monkeypatch.undo()
    storage.delete(directory)
    whole: list[Rung] = []
    run_trial(resolved, storage, inputs, rungs, lambda rung, passed: whole.append(rung))
    assert [rung.value for rung in whole] == [rung.value for rung in told]


def test_a_trial_has_the_time_and_the_sampler_of_the_search_and_shows_nothing(
    tiny_config: Path,
) -> None:
    every = ("keep_every", "validate_every", "sample_every", "fid_every")
    shown = [f"train.{name}=5" for name in every]
    config = load_config(tiny_config, [*SETTINGS, *shown, "tune.num_steps=3"])
    resolved = trial_config(config, ["train.learning_rate=0.5"])
    assert (resolved.train.num_steps, resolved.train.learning_rate) == (18, 0.5)
    assert [getattr(resolved.train, name) for name in every] == [None] * 4
    assert resolved.evaluate.num_steps == 3
