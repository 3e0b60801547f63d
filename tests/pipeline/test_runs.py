"""The record of a run: what became of each of its executions."""

from pathlib import Path

from pipeline.config import load_config
from pipeline.leases import hold_lease
from pipeline.runs import RunRecord, read_run
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
