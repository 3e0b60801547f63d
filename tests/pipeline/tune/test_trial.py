"""One trial without Ray: scored at its rungs, killed and continued, and found again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    assert rungs("tune.grace_images=64") == [4, 12, 18]
    assert rungs("tune.reduction_factor=2") == [4, 8, 16, 18]
    assert rungs("tune.stopping=none") == [18]
    assert grace_steps(load_config(tiny_config, SETTINGS)) == 2


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

    def kill_at_second(rung: Rung) -> None:
        if rung.step == rungs[1]:
            raise Killed

    with pytest.raises(Killed):
        run_trial(resolved, storage, inputs, rungs, kill_at_second)
    store = TrialStore(storage, directory)
    first = store.rungs()
    assert [rung.step for rung in first] == rungs[:2]
    assert not store.is_finished
    assert CheckpointStore(storage, directory).steps()

    told: list[Rung] = []
    run_trial(resolved, storage, inputs, rungs, told.append)
    assert [rung.step for rung in told] == rungs
    assert told[:2] == first  # scores that were made are not made again
    assert store.is_finished

    again: list[Rung] = []
    monkeypatch.setattr(trial, "train_in_process", None)  # nothing is trained
    run_trial(resolved, storage, inputs, rungs, again.append)
    assert again == told

    monkeypatch.undo()
    storage.delete(directory)
    whole: list[Rung] = []
    run_trial(resolved, storage, inputs, rungs, whole.append)
    assert [rung.value for rung in whole] == [rung.value for rung in told]
