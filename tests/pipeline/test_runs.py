"""The record of a run: what became of each of its executions."""

import json
from pathlib import Path

from pipeline.config import load_config
from pipeline.leases import hold_lease
from pipeline.runs import RunRecord, last_identities, read_run
from pipeline.storage import LocalStorage


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
