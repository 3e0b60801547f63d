"""What stands between Ray Tune and the records, without a cluster."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import Node
from pipeline.config import load_config
from pipeline.errors import ClusterError, StorageError
from pipeline.storage import LocalStorage
from pipeline.tune import scheduling
from pipeline.tune.records import Entry, Records, Result, Rung
from pipeline.tune.scheduling import IMAGES, SCORE, _make_scheduler, _Watcher, concurrency

RUNGS, BATCH = [10, 30, 90], 16
SETTINGS = ["train.num_workers=1", "tune.train_steps=90", f"train.global_batch_size={BATCH}"]


def rung(step: int, value: float = 1.0) -> Rung:
    return Rung(step, BATCH * step, value, 0.0, 0.0)


def scheduler(tiny_config: Path, replayed: dict[str, Result] | None = None) -> Any:
    return _make_scheduler(load_config(tiny_config, SETTINGS), RUNGS, replayed or {})


def judge(judged: Any, name: str, step: int, score: float, **more: Any) -> str:
    """What becomes of a trial that reports this."""
    trial = SimpleNamespace(trial_id=name, config={"is_default": name == "0000"})
    if name not in judged._trial_info:
        judged.on_trial_add(None, trial)
    return judged.on_trial_result(None, trial, {IMAGES: BATCH * step, SCORE: score, **more})


def test_one_in_so_many_goes_on_at_each_rung(tiny_config: Path) -> None:
    judged = scheduler(tiny_config)
    assert judge(judged, "0001", 10, 1.0) == "CONTINUE"
    assert judge(judged, "0002", 10, 5.0) == "STOP"
    assert judge(judged, "0003", 10, 0.5) == "CONTINUE"
    assert judge(judged, "0003", 90, 9.0) == "STOP"  # its end


def test_the_config_as_it_is_is_trained_to_its_end(tiny_config: Path) -> None:
    judged = scheduler(tiny_config)
    for step in (10, 30):
        judge(judged, "0001", step, 1.0)
        assert judge(judged, "0000", step, 9.0) == "CONTINUE"
    assert judge(judged, "0000", 90, 9.0) == "STOP"


def test_what_has_passed_a_rung_is_not_judged_there_again(tiny_config: Path) -> None:
    judged = scheduler(tiny_config)
    judge(judged, "0001", 10, 1.0)
    assert judge(judged, "0002", 10, 5.0, has_passed=True) == "CONTINUE"
    assert judge(judged, "0002", 30, 5.0, has_passed=False) == "CONTINUE"  # alone at this rung


def test_trials_of_an_earlier_process_are_compared_with(tiny_config: Path) -> None:
    past = {
        "0001": Result("finished", [rung(10, 1.0), rung(30, 0.9), rung(90, 0.8)], 1.0),
    }
    assert judge(scheduler(tiny_config), "0003", 10, 5.0) == "CONTINUE"
    assert judge(scheduler(tiny_config, past), "0003", 10, 5.0) == "STOP"
    assert judge(scheduler(tiny_config, past), "0003", 10, 0.5) == "CONTINUE"


@pytest.mark.parametrize(("value", "verdict"), [(4.0, "STOP"), (0.5, "CONTINUE")])
def test_what_a_trial_scored_before_it_failed_counts_after_a_kill_as_it_did_before(
    tiny_config: Path, value: float, verdict: str
) -> None:
    failed = Result("failed", [rung(10, 1.0)], 1.0, "the loss was not finite")
    whole, resumed = scheduler(tiny_config), scheduler(tiny_config, {"0001": failed})
    judge(whole, "0001", 10, 1.0)
    for judged in (whole, resumed):
        judge(judged, "0002", 10, 5.0)
        assert judge(judged, "0003", 10, value) == verdict


class Watched:
    """A watcher over two trials, and what it told."""

    def __init__(self, root: Path, source: Sequence[Entry | Exception] = ()) -> None:
        self.given = list(source) or [Entry(f"000{k}", k, {}, [], f"key{k}") for k in (1, 2)]
        self.records = Records(LocalStorage(str(root)), "steps/tune/e")
        self.ended: list[str] = []
        self.watcher = _Watcher(
            self.records, self._next, lambda entry, result: self.ended.append(entry.name),
            lambda entry, rung: None, RUNGS[-1], at_a_time=2,
        )  # fmt: skip

    def _next(self) -> Entry | None:
        found = self.given.pop(0) if self.given else None
        if isinstance(found, Exception):
            raise found
        return found


def test_a_trial_holds_its_place_until_it_ends(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watcher = watched.watcher
    for name in ("0001", "0002"):
        assert not watcher.is_full
        suggested = watcher.suggest()
        assert suggested is not None
        assert suggested["name"] == name
    assert watcher.is_full
    watcher.take("0001", {"rung": vars(rung(90))})
    watcher.end("0001", {}, "")
    assert not watcher.is_full
    assert watched.records.results()["0001"].outcome == "finished"
    watcher.look({"0001": "TERMINATED", "0002": "ERROR"})  # of which Ray Tune told nothing
    assert watcher.open == set()
    assert watched.ended == ["0001"]
    assert "0002" not in watched.records.results()  # so that it is run again


def test_a_fault_of_the_storage_is_no_verdict_on_a_trial(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watcher.suggest()
    lost = {"lost": "The bucket is gone. Wait.", "kind": "StorageError"}
    watched.watcher.end("0001", lost, "")
    assert watched.records.results() == {}
    assert watched.watcher.suggest() is None  # nothing more begins
    assert [type(error) for error in watched.watcher.errors] == [StorageError]


def test_an_error_of_the_source_ends_the_search(tmp_path: Path) -> None:
    watched = Watched(tmp_path, [StorageError("It is full. Free space.")])
    assert watched.watcher.suggest() is None
    assert [str(error) for error in watched.watcher.errors] == ["It is full. Free space."]


def test_a_search_without_a_place_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path)
    watched.watcher.suggest()
    watched.watcher.look({"0001": "PENDING"})
    now = scheduling.time.monotonic() + scheduling.IDLE_TIMEOUT_S + 1
    monkeypatch.setattr(scheduling.time, "monotonic", lambda: now)
    with pytest.raises(ClusterError, match="No trial has run for 10 minutes, and 1 wait"):
        watched.watcher.look({"0001": "PENDING"})
    watched.watcher.errors.clear()
    watched.watcher.look({"0001": "RUNNING"})
    assert watched.watcher.errors == []


@pytest.mark.parametrize(
    ("settings", "at_a_time"),
    [
        ([], 5),  # 4 and 1 of a CPU each: 8 // 2, 3 // 2
        (["train.cpus_per_worker=1"], 11),
        (["train.num_workers=2"], 2),
        (["tune.max_concurrent=3"], 3),
        (["tune.max_concurrent=9"], 5),
        (["train.num_workers=[1, 9]"], 1),  # as many as it may come to take, and one at least
    ],
)
def test_as_many_trials_at_a_time_as_fit_and_are_wanted(
    tiny_config: Path, settings: list[str], at_a_time: int
) -> None:
    given = [*SETTINGS, "train.cpus_per_worker=2", "train.global_batch_size=144"]
    config = load_config(tiny_config, [*given, *settings])
    assert concurrency(config, [Node(cpus=8, gpus=0), Node(cpus=3, gpus=0)]) == at_a_time


def test_a_trial_whose_process_died_has_failed(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watcher.suggest()
    watched.watcher.end("0001", {}, "its process died: killed")
    result = watched.records.results()["0001"]
    assert (result.outcome, result.reason) == ("failed", "its process died: killed")
