"""A search as a whole, killed and continued; what stands for Ray Tune runs one trial at a time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline import leases
from pipeline.config import load_config
from pipeline.errors import DataError
from pipeline.extractors.naming import ARTIFACT
from pipeline.protocol import differences
from pipeline.storage import LocalStorage
from pipeline.tune import experiment
from pipeline.tune.experiment import _Experiment
from pipeline.tune.proposer import MAX_REFUSALS
from pipeline.tune.records import Entry, Records, Result, Rung
from pipeline.tune.scheduling import OnEnd, Source
from pipeline.tune.scoring import trial_protocol
from pipeline.tune.trial import trial_config
from pipeline.workflow import StepContext

DIRECTORY = "steps/tune/e"
FEATURES = {"metrics": {"extractor": "classifier", "num_features": 4}, "key": "f"}
INPUTS: dict[str, Any] = {
    "preprocess": {"key": "p"},
    "features": FEATURES | {"artifacts": {ARTIFACT: {"sha256": "0"}}},
    "reference": {"key": "r", "metrics": {"counts": {"validation": 64}}},
}
FINITE = ["tune.space.schedule=[]", 'tune.space.weighting=["uniform", "min_snr"]']


class Killed(BaseException):
    """Stands for a kill: nothing of the project catches it."""


class OneByOne:
    """Stands for Ray Tune: a trial ends before the next is asked for."""

    def __init__(
        self, kill_at: str | None = None, scores: Callable[[Entry], float] = lambda entry: 1.0
    ) -> None:
        self.kill_at, self.scores = kill_at, scores
        self.calls: list[tuple[int, list[int]]] = []  # trials at most, and rungs
        self.ran: list[tuple[str, int]] = []  # names, and of which call
        self.lose: set[str] = set()  # names of trials that are lost without a word, once
        self.fail: set[str] = set()  # names of trials that fail

    def __call__(
        self, config: Any, storage: Any, inputs: Any, records: Records, source: Source,
        on_end: OnEnd, *, count: int, at_a_time: int, rungs: Sequence[int], replayed: Any,
    ) -> None:  # fmt: skip
        self.calls.append((count, list(rungs)))
        for _ in range(count):
            if (entry := source()) is None:
                return
            records.add(entry)
            if entry.name == self.kill_at:
                raise Killed
            self.ran.append((entry.name, len(self.calls)))
            if entry.name in self.lose:
                self.lose.remove(entry.name)
                continue
            scored = [Rung(step, 32 * step, self.scores(entry), 0.0, 0.0) for step in rungs]
            result = Result("finished", scored, 1.0)
            if entry.name in self.fail:
                result = Result("failed", [], 1.0, "the loss was not finite")
            records.end(entry, result)
            on_end(entry, result)


@pytest.fixture
def search(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a search, or what is left of it, and returns its document and its notes."""

    def run(runner: OneByOne, *overrides: str) -> tuple[dict[str, Any], list[str]]:
        given = ["tune.metric=bits_per_dim", "tune.num_seeds=2", "tune.train_steps=90"]
        notes: list[str] = []
        context: Any = SimpleNamespace(
            config=load_config(tiny_config, [*given, *overrides]),
            storage=LocalStorage(str(tmp_path)), inputs=INPUTS, directory=DIRECTORY,
            note=notes.append, progress=lambda *arguments: None,
        )  # fmt: skip
        monkeypatch.setattr(experiment, "run_trials", runner)
        found = _Experiment(context, 1)
        found.search()
        finalists = found.find_finalists()
        found.train_again(finalists)
        return found.describe(finalists), notes

    return run


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Of that search."""
    return Records(LocalStorage(str(tmp_path)), DIRECTORY)


def test_a_thin_reference_is_refused(tiny_config: Path) -> None:
    counts = {"preprocess": {"metrics": {"counts": {"validation": 39}}}, "features": FEATURES}
    context = SimpleNamespace(config=load_config(tiny_config), inputs=counts)
    with pytest.raises(DataError) as caught:
        experiment._check_counts(cast("StepContext", context))
    assert "= 40 validation images as its reference, and there are 39" in str(caught.value)
    assert str(caught.value).endswith('or set tune.metric = "bits_per_dim".')


def test_a_finalist_that_was_killed_is_continued_as_one(search: Callable[..., Any]) -> None:
    with pytest.raises(Killed):
        search(OneByOne(kill_at="0001-seed1"), *FINITE, "tune.num_trials=6")
    again = OneByOne()
    document, _ = search(again, *FINITE, "tune.num_trials=6")
    assert [name for name, _ in again.ran] == ["0001-seed1", "0001-seed2"]
    assert again.calls == [(2, [90])]  # without the search's rungs; the search is over
    assert {f["number"]: len(f["scores"]) for f in document["finalists"]} == {0: 2, 1: 2}
    once_more = OneByOne()
    assert search(once_more, *FINITE, "tune.num_trials=6")[0] == document
    assert once_more.calls == []  # Ray Tune is not started for nothing


@pytest.mark.parametrize("name", ["0001", "0001-seed2"])
def test_what_ray_lost_is_run_again_in_its_phase(search: Callable[..., Any], name: str) -> None:
    runner = OneByOne()
    runner.lose = {name}
    document, _ = search(runner, "tune.num_trials=3", "tune.num_finalists=1")
    first, second = (call for found, call in runner.ran if found == name)
    assert second == first + 1
    assert runner.calls[first] == (1, runner.calls[first - 1][1])
    assert document["counts"] == {"trials": 3, "finished": 3}
    assert [len(f["scores"]) for f in document["finalists"]] == [2, 2]


def test_a_space_that_is_gone_through_is_said_with_what_was_refused(
    search: Callable[..., Any], records: Records
) -> None:
    with pytest.raises(Killed):
        search(OneByOne(kill_at="0001"), *FINITE, "tune.num_trials=6")
    assert records.exhaustion() is None
    with pytest.raises(Killed):
        search(OneByOne(kill_at="0000-seed1"), *FINITE, "tune.num_trials=6")
    document, notes = search(OneByOne(), *FINITE, "tune.num_trials=6")
    assert document["exhausted"] == records.exhaustion()
    found = document["exhausted"]
    assert (found["num_trials"], found["asked_for"]) == (2, 6)
    assert found["refused"] == {"the config as it is, or proposed before": MAX_REFUSALS}
    before = sum(sum(trial["refused"].values()) for trial in document["trials"])
    assert document["refused"] == {"the config as it is, or proposed before": before + MAX_REFUSALS}
    assert [note for note in notes if "nothing new" in note] == [
        "the space holds nothing new after 2 of 6 trials: 200 draws in a row were refused"
    ]


def test_a_space_with_enough_in_it_is_not_called_exhausted(search: Callable[..., Any]) -> None:
    document, notes = search(OneByOne(), "tune.num_trials=3")
    assert document["exhausted"] is None
    assert not [note for note in notes if "nothing new" in note]


def test_what_is_known_to_be_exhausted_is_not_drawn_from_again(
    search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    document, _ = search(OneByOne(), *FINITE, "tune.num_trials=6")
    monkeypatch.setattr(experiment.Proposer, "ask", None)
    assert search(OneByOne(), *FINITE, "tune.num_trials=6")[0] == document


def test_a_search_killed_between_trials_proposes_what_it_would_have(
    search: Callable[..., Any], records: Records
) -> None:
    def score(entry: Entry) -> float:
        return sum(value for value in entry.choice.values() if isinstance(value, float))

    overrides = ("tune.num_trials=18", "tune.stopping=none", "tune.num_finalists=1")
    wide = "tune.space.linear.beta_start=[1e-6, 0.9]"  # much of it is refused
    whole, _ = search(OneByOne(scores=score), *overrides, wide)
    records.storage.delete(DIRECTORY)
    for name in ("0001", "0005", "0012", "0016"):  # the last ones are TPE's
        with pytest.raises(Killed):
            search(OneByOne(kill_at=name, scores=score), *overrides, wide)
    assert search(OneByOne(scores=score), *overrides, wide)[0] == whole
    assert sum(len(trial["refused"]) for trial in whole["trials"]) > 0


@pytest.mark.parametrize("metric", ["fid", "bits_per_dim"])
def test_finalists_are_scored_with_noise_that_the_search_has_not_seen(
    search: Callable[..., Any], records: Records, tiny_config: Path, metric: str
) -> None:
    given = ["tune.num_trials=3", f"tune.metric={metric}", "evaluate.seed=7"]
    document, _ = search(OneByOne(), *given)
    config = load_config(tiny_config, given)
    protocols = {
        entry.name: trial_protocol(trial_config(config, entry.overrides), INPUTS)
        for entry in records.entries()
    }
    assert protocols["0000"] == protocols["0001"] == protocols["0002"]
    for k in (1, 2):  # the same for all finalists, so that they compare
        first, *others = [protocols[f"{number:04d}-seed{k}"] for number in range(3)]
        assert others == [first, first]
        assert differences(protocols["0000"], first) == ["seed"]
        assert first["seed"] == 7 + k
    assert document["protocol"] == protocols["0000"] | {"finalist_seeds": [8, 9]}
    assert records.keep_protocol({}) == document["protocol"]


def test_a_search_leaves_no_checkpoints_of_a_node_that_died(
    search: Callable[..., Any], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LIFE_S", 0.2)
    kept: list[str] = []

    def die(entry: Entry) -> float:
        holder = {"host": "other", "place": "elsewhere", "pid": 7, "process_started": 1}
        lease = holder | {"beats": 3, "beat_at": 0.0, "released": False}
        records.storage.create(f"{entry.directory}/lease-000001.json", json.dumps(lease).encode())
        kept.append(f"{entry.directory}/checkpoints/000000010/manifest.json")
        records.storage.create(kept[-1], b"{}")
        return 1.0

    search(OneByOne(scores=die), "tune.num_trials=2", "tune.stopping=none")
    assert len(set(kept)) == 6
    assert not [path for path in kept if records.storage.exists(path)]


def test_the_best_are_trained_again_with_seeds_that_the_search_has_not_seen(
    search: Callable[..., Any], records: Records, tiny_config: Path
) -> None:
    best = OneByOne(scores=lambda entry: float(5 - entry.number))
    document, _ = search(best, "tune.num_trials=4", "tune.num_finalists=2", "train.seed=3")
    seeded = [entry for entry in records.entries() if entry.is_seeded]
    assert [entry.number for entry in seeded] == [0, 0, 2, 2, 3, 3]
    config = load_config(tiny_config, ["train.seed=3"])
    seeds = [trial_config(config, entry.overrides).train.seed for entry in seeded]
    assert seeds == [4, 5] * 3
    assert document["cost"]["images"] == (4 + 6) * 32 * 90


def test_who_fails_with_a_seed_is_neither_best_nor_recommended(
    search: Callable[..., Any],
) -> None:
    runner = OneByOne(scores=lambda entry: 9.0 - 8 * (entry.number == 1))
    runner.fail = {"0001-seed2"}
    document, _ = search(runner, "tune.num_trials=2", "tune.num_seeds=3")
    assert document["verdict"]["kind"] == "not distinguishable"
    assert document["recommended"] == 0
    assert {f["number"]: f["failed"] for f in document["finalists"]} == {0: 0, 1: 1}


def test_a_config_that_fails_as_it_is_is_not_trained_again(
    search: Callable[..., Any], records: Records
) -> None:
    runner = OneByOne()
    runner.fail = {"0000"}
    document, _ = search(runner, "tune.num_trials=2")
    assert {entry.number for entry in records.entries() if entry.is_seeded} == {1}
    assert document["verdict"]["kind"] == "unopposed"
