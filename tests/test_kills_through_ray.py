"""Three SIGKILLs of Ray Train's workers at random steps of one training, and no trace of them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.storage import LocalStorage
from pipeline.trace import VARIABLE, TraceReader

from .conftest import cli_program

NUM_STEPS, NUM_KILLS, EVERY = 900, 3, 30


def last_checkpoint(root: Path) -> Checkpoint:
    (directory,) = {path.parent.parent.name for path in root.glob("steps/train/*/checkpoints/*")}
    checkpoint = CheckpointStore(LocalStorage(str(root)), f"steps/train/{directory}").load(
        NUM_STEPS
    )
    assert checkpoint is not None
    return checkpoint


@pytest.mark.slow
def test_three_kills_through_ray_train_leave_no_trace(
    tiny_config: Path, ray_cluster: str, run_cli: Callable[..., Any]
) -> None:
    settings = {
        "cluster.address": ray_cluster,
        "train.num_steps": NUM_STEPS,
        "train.checkpoint_every": EVERY,
        "train.log_every": 5,
        "train.max_failures": NUM_KILLS,
        "train.learning_rate_decay": "cosine",
        "model.dropout": 0.1,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    cwd = tiny_config.parent
    command = ["train", str(tiny_config), *options]
    whole = run_cli(*command, "--set", "storage.root=whole", cwd=cwd, timeout=600)
    assert whole.returncode == 0, whole.stdout + whole.stderr

    path = cwd / "trace.jsonl"
    reader = TraceReader(path)
    process = subprocess.Popen(
        [cli_program(), *command, "--set", "storage.root=killed", "--json"],
        cwd=cwd,
        env={**os.environ, VARIABLE: str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rng = np.random.default_rng(2)
    kill_at = np.sort(rng.choice(np.arange(EVERY, NUM_STEPS - 2 * EVERY), NUM_KILLS, replace=False))
    killed: list[tuple[int, int]] = []  # rank, last step it was part of
    dead: set[int] = set()
    deadline = time.monotonic() + 900
    while process.poll() is None and len(killed) < NUM_KILLS and time.monotonic() < deadline:
        time.sleep(0.005)
        reader.read()
        live = [row for row in reader.rows if row["pid"] not in dead]
        if not live or live[-1]["global_step"] < kill_at[len(killed)]:
            continue
        rank = int(rng.integers(2))
        group = {entry["rank"]: entry["pid"] for entry in reader.began}  # the latest of each rank
        os.kill(group[rank], signal.SIGKILL)
        killed.append((rank, live[-1]["global_step"]))
        dead |= set(group.values())
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, out + errors
    assert len(killed) == NUM_KILLS, killed
    reader.read()
    resumed = sorted({row["first_step"] for row in reader.rows})
    assert len(resumed) == NUM_KILLS + 1, resumed
    assert all(step % EVERY == 0 for step in resumed)
    assert json.loads(out)["metrics"]["train"]["resumed_from"] == resumed[-1]

    ours, theirs = last_checkpoint(cwd / "killed"), last_checkpoint(cwd / "whole")
    for kind in ("model", "ema"):
        mine, other = getattr(ours, kind), getattr(theirs, kind)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        mine, other = (c.optimizer["optimizer"]["state"] for c in (ours, theirs))
        assert all(torch.equal(mine[k][moment], other[k][moment]) for k in other)
    assert [row["loss"] for row in ours.history] == [row["loss"] for row in theirs.history]
