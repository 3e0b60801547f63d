"""Scores beside training on a real Ray: one worker, one task beside it, and the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.workflow import read_artifact, read_manifest


@pytest.mark.slow
def test_a_training_is_scored_while_it_goes_on(
    tiny_config: Path, tmp_path: Path, ray_cluster: str, run_cli: Callable[..., Any]
) -> None:
    settings = [
        f"storage.root={tmp_path / 'runs'}", "train.num_workers=1", "train.num_steps=120",
        "train.fid_every=60", "train.fid_samples=64",
        "evaluate.num_steps=4", "evaluate.num_samples=64",
    ]  # fmt: skip
    given = [
        part for text in [*settings, f"cluster.address={ray_cluster}"] for part in ("--set", text)
    ]
    done = run_cli("run", str(tiny_config), *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    order = [line.split()[0] for line in lines if " runs: " in line]
    assert order.index("reference") < order.index("train")

    planned = make_plan(load_config(tiny_config, settings))
    keys = {p.step.name: p.key for p in planned.steps}
    plain = make_plan(load_config(tiny_config, [s for s in settings if "fid" not in s]))
    assert {p.step.name: p.key for p in plain.steps} == keys
    train, report = (read_manifest(planned.storage, s, keys[s]) for s in ("train", "report"))
    assert train is not None
    assert report is not None
    rows = [
        json.loads(line) for line in read_artifact(planned.storage, train, "fid.jsonl").splitlines()
    ]
    steps = [row["global_step"] for row in rows]
    assert steps == [60, 120] or (
        steps == [60] and "1 of 2 FIDs that were due were not made: at step 120" in done.stdout
    )
    assert all(row["protocol"]["reference_split"] == "validation" for row in rows)
    assert f"fid[classifier] {rows[0]['value']:.2f} at step 60 (64 samples" in done.stdout
    page = read_artifact(planned.storage, report, "report.html").decode()
    assert "Score while training" in page
    assert f"after {min(rows, key=lambda row: row['value'])['global_step']} steps" in page
