"""The record of a run: what became of each of its executions."""

import json
import re
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import StorageError
from pipeline.garbage import collect_garbage
from pipeline.leases import hold_lease
from pipeline.runs import RunRecord, last_identities, list_runs, read_progress, read_run
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage
from pipeline.workflow import plan, read_manifest

DAMAGED = [b"", b"\0" * 64, b"\xff", b"{", b"[]", b"{}", b'{"name": "m", "executions": []}']


def test_an_execution_that_was_killed_is_not_said_to_run(tmp_path: Path, tiny_config: Path) -> None:
    storage, config = LocalStorage(str(tmp_path / "runs")), load_config(tiny_config)

    def outcomes() -> list[str]:
        return [execution["outcome"] for execution in read_run(storage, "m-1")["executions"]]

    RunRecord(storage, "m-1", config, [])  # and no more is heard of it
    assert outcomes() == ["killed"]
    with hold_lease(storage, "runs/m-1"):
        record = RunRecord(storage, "m-1", config, [])
        assert outcomes() == ["killed", "running"]
        record.close("done")
    assert outcomes() == ["killed", "done"]


def test_changes_are_told_against_a_run_that_evaluated_the_same_kind(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    trained, images, given = ["train", "evaluate"], ["images", "evaluate"], ["evaluate"]
    runs = [("prepared", ["preprocess"]), ("whole", trained), ("of-images", images)]
    for started, (run, steps) in enumerate(runs):
        document = {
            "name": "m", "executions": [{"started": started}],
            "identities": {step: {"settings": {"run": run}} for step in steps},
        }  # fmt: skip
        storage.create(f"runs/{run}/run.json", json.dumps(document).encode())

    def compared(steps: list[str]) -> str:
        known = last_identities(storage, "m", steps)
        assert known is not None
        return next(iter(known.values()))["settings"]["run"]

    assert compared(trained) == "whole"
    assert compared(images) == "of-images"
    assert compared(given) == "prepared"
    assert last_identities(storage, "other", trained) is None


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_stops_only_its_own_run(
    content: bytes, tmp_path: Path, tiny_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, config = LocalStorage(str(tmp_path)), load_config(tiny_config)
    RunRecord(storage, "tiny-1", config, []).close("done")
    storage.create("runs/m-2/run.json", content)
    assert list_runs(storage) == ["tiny-1"]
    assert last_identities(storage, "tiny", []) == {}
    assert read_run(storage, "tiny-1")["name"] == "tiny"
    sentence = (
        f"{storage.uri}/runs/m-2/run.json is missing or not what its manifest says. Bring it "
        "back from a copy, or delete the directory runs/m-2 below the storage root and run what "
        "made it again, with the same input: it is made anew."
    )
    assert sentence in caplog.text
    for use in (
        lambda: read_run(storage, "m-2"),
        lambda: RunRecord(storage, "m-2", config, []),
        lambda: collect_garbage(storage),
    ):
        with pytest.raises(StorageError, match=re.escape(sentence)):
            use()


def test_what_is_no_text_is_damaged_as_what_is_no_json(tmp_path: Path) -> None:
    storage, key = LocalStorage(str(tmp_path)), "0" * 32
    storage.create(f"steps/train/{key}/manifest.json", b"\0\xff" * 32)
    with pytest.raises(StorageError, match=r"manifest.json is missing or not what"):
        read_manifest(storage, "train", key)
    storage.create("runs/m-1/lease-000001.json", b"\0\xff" * 32)
    with hold_lease(storage, "runs/m-1", wait=False):
        pass
    document = {"live": {"pid": 1}, "directories": {"train": "t"}}
    storage.create("t/progress.json", b"\0\xff" * 32)
    assert read_progress(storage, document) is None


def test_a_record_knows_a_run_by_what_it_was_planned_as_last(
    tmp_path: Path, tiny_config: Path
) -> None:
    storage, config = LocalStorage(str(tmp_path)), load_config(tiny_config)
    steps = make_steps(config, [])
    longer = make_steps(load_config(tiny_config, ["train.num_steps=900"]), [])
    RunRecord(storage, "m-1", config, plan(steps, storage)).close("done")
    RunRecord(storage, "m-1", config, plan(longer, storage)[3:]).close("done")
    identities = read_run(storage, "m-1")["identities"]
    assert identities["train"]["settings"]["train.num_steps"] == 900
    assert identities["preprocess"] == plan(steps, storage)[0].identity  # of which it has no other


def test_the_latest_run_is_the_one_that_was_started_last(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    for run, started in (("a", [1, 9]), ("b", [2]), ("c", [3])):
        document = {
            "name": "m", "identities": {"train": {"settings": {"run": run}}},
            "executions": [{"started": time} for time in started],
        }  # fmt: skip
        storage.create(f"runs/{run}/run.json", json.dumps(document).encode())
    assert list_runs(storage) == ["b", "c", "a"]
    known = last_identities(storage, "m", ["train"])
    assert known is not None
    assert known["train"]["settings"]["run"] == "a"
