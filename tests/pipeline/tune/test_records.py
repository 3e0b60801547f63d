"""What an experiment keeps, and what a kill between two writes leaves."""

import json
import threading
import time
from pathlib import Path

import pytest

from pipeline import leases
from pipeline.leases import hold_lease
from pipeline.storage import LocalStorage
from pipeline.tune.records import Entry, Records, Result, Rung, TrialStore

ENTRY = Entry(
    "0001", 1, {"schedule": "cosine", "cosine.s": 0.01}, ["diffusion.schedule=cosine"], "k"
)
RUNGS = [Rung(10, 320, 9.5, 1.0, 0.2), Rung(30, 960, 4.5, 2.0, 0.2)]


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    records = Records(LocalStorage(str(tmp_path)), "steps/tune/e")
    records.add(ENTRY)
    assert records.entries() == [ENTRY]
    assert records.result(ENTRY) is None
    records.end(ENTRY, Result("finished", RUNGS, 3.5))
    again = Records(LocalStorage(str(tmp_path)), "steps/tune/e")
    result = again.results()["0001"]
    assert result == Result("finished", RUNGS, 3.5)
    assert result.value == 4.5
    assert result.by_images == {320: 9.5, 960: 4.5}


def test_the_first_result_of_a_trial_counts(tmp_path: Path) -> None:
    records = Records(LocalStorage(str(tmp_path)), "steps/tune/e")
    records.add(ENTRY)
    records.end(ENTRY, Result("stopped", RUNGS[:1], 1.0))
    records.end(ENTRY, Result("finished", RUNGS, 2.0))  # by a zombie
    found = records.result(ENTRY)
    assert found is not None
    assert (found.outcome, found.value) == ("stopped", None)


def test_a_failed_trial_has_no_score_to_learn_from() -> None:
    failed = Result("failed", RUNGS, 1.0, "the loss was not finite")
    assert failed.value is None
    assert failed.by_images == {}


def test_checkpoints_stay_while_someone_is_at_the_trial(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    records, other = Records(storage, "steps/tune/e"), Entry("0002", 2, {}, [], "other")
    kept = f"{ENTRY.directory}/checkpoints/000000010/manifest.json"
    storage.create(kept, b"{}")
    with hold_lease(storage, ENTRY.directory):  # a stopped trial's thread, or another search
        records.end(ENTRY, Result("stopped", RUNGS[:1], 1.0))
        assert storage.exists(kept)
    records.end(other, Result("stopped", RUNGS[:1], 1.0))  # the next to end
    assert not storage.exists(kept)


def elsewhere(beats: int) -> bytes:
    """The lease of a process of another host, whose clock is an hour behind."""
    holder = {"host": "other", "place": "elsewhere", "pid": 7, "process_started": 1}
    beat = {"beats": beats, "beat_at": time.time() - 3600, "released": False}
    return json.dumps(holder | beat).encode()


def test_checkpoints_of_a_process_that_died_elsewhere_go_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LIFE_S", 0.2)
    storage = LocalStorage(str(tmp_path))
    for key in ("k", "other"):
        storage.create(f"steps/trial/{key}/checkpoints/000000010/manifest.json", b"{}")
        storage.create(f"steps/trial/{key}/lease-000001.json", elsewhere(3))
    records, other = Records(storage, "steps/tune/e"), Entry("0002", 2, {}, [], "other")
    records.add(ENTRY)
    records.end(ENTRY, Result("failed", [], 1.0, "its process died"))
    assert storage.list(f"{ENTRY.directory}/checkpoints")  # it may live: nothing waits for it yet
    records.drop_checkpoints([ENTRY, other], is_last=True)
    assert storage.list(f"{ENTRY.directory}/checkpoints") == []
    assert storage.list(f"{other.directory}/checkpoints") == []


def test_checkpoints_stay_in_the_end_with_who_lives_elsewhere(tmp_path: Path) -> None:
    storage, ended = LocalStorage(str(tmp_path)), threading.Event()
    lease = f"{ENTRY.directory}/lease-000001.json"
    storage.create(f"{ENTRY.directory}/checkpoints/000000010/manifest.json", b"{}")
    storage.create(lease, elsewhere(0))

    def beat() -> None:
        beats = 0
        while not ended.wait(0.02):
            beats += 1
            storage.replace(lease, elsewhere(beats))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        Records(storage, "steps/tune/e").drop_checkpoints([ENTRY], is_last=True)
    finally:
        ended.set()
        thread.join()
    assert storage.list(f"{ENTRY.directory}/checkpoints")


def test_the_protocol_of_the_first_attempt_stays(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    assert Records(storage, "steps/tune/e").keep_protocol({"seed": 0}) == {"seed": 0}
    assert Records(storage, "steps/tune/e").keep_protocol({"seed": 1}) == {"seed": 0}


def test_checkpoints_go_when_a_trial_has_ended_and_its_scores_stay(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    records, trial = Records(storage, "steps/tune/e"), TrialStore(storage, ENTRY.directory)
    storage.create(f"{ENTRY.directory}/checkpoints/000000010/manifest.json", b"{}")
    trial.add_rung(RUNGS[0], b"pixels")
    records.add(ENTRY)
    records.end(ENTRY, Result("stopped", RUNGS[:1], 1.0))
    assert storage.list(f"{ENTRY.directory}/checkpoints") == []
    assert trial.rungs() == RUNGS[:1]
    assert trial.read_samples(10) == b"pixels"
    assert trial.read_samples(20) is None
    assert not trial.is_finished
