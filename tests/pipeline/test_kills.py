"""Twenty SIGKILLs at random steps of one run of the bare loop, with two ranks."""

import json
import multiprocessing
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.loop import Hooks
from pipeline.settings import Config
from pipeline.storage import LocalStorage
from pipeline.train import process_group, train_in_process

NUM_STEPS, NUM_KILLS, WORLD_SIZE = 120, 20, 2


def train_rank(
    rank: int,
    port: int,
    config: Config,
    root: str,
    data: dict[str, Any],
    name: str,
    out: Connection,
) -> None:
    hooks = Hooks(on_row=lambda row, first_step: out.send((first_step, row["global_step"])))
    address = f"tcp://127.0.0.1:{port}"
    with process_group(config.train, init_method=address, rank=rank, world_size=WORLD_SIZE):
        train_in_process(
            config, LocalStorage(root), name, data, rank=rank, world_size=WORLD_SIZE, hooks=hooks
        )


def run(arguments: tuple[Any, ...], kill_at: int | None) -> tuple[int, int]:
    """Trains until it is done, or kills all ranks at a step; the first and the last step seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    seen, out = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=train_rank, args=(rank, port, *arguments, out))
        for rank in range(WORLD_SIZE)
    ]
    for process in ranks:
        process.start()
    out.close()
    steps = (-1, -1)
    try:
        while kill_at is None or steps[1] < kill_at:
            steps = seen.recv()
        for process in ranks:
            process.kill()
    except EOFError:  # they are done
        pass
    for process in ranks:
        process.join()
    return steps


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(
    tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8)
    data = write_data_set(LocalStorage(str(tmp_path)), pixels)
    settings = [
        f"train.num_steps={NUM_STEPS}",
        "train.checkpoint_every=7",
        "train.log_every=1",
        "model.dropout=0.1",
        "train.learning_rate_decay=cosine",
    ]
    config = load_config(tiny_config, settings)
    assert run((config, str(tmp_path), data, "whole"), None)[1] == NUM_STEPS
    rng = np.random.default_rng(1)
    reached, kills, first = 0, 0, 0
    while kills < NUM_KILLS:
        left = NUM_STEPS - reached
        kill_at = reached + int(rng.integers(1, max(2, 2 * left // (NUM_KILLS - kills + 1))))
        before = first
        first, last = run((config, str(tmp_path), data, "killed"), kill_at)
        assert before <= first <= last <= NUM_STEPS, "it made no step, or began anew"
        assert last < NUM_STEPS, "it was done before it was killed"
        reached, kills = max(reached, (last // 7) * 7), kills + 1
    assert run((config, str(tmp_path), data, "killed"), None)[0] > NUM_STEPS // 2
    whole, killed = (
        CheckpointStore(LocalStorage(str(tmp_path)), name).load(NUM_STEPS)
        for name in ("whole", "killed")
    )
    assert whole is not None
    assert killed is not None
    for kind in ("model", "ema"):
        ours, theirs = getattr(killed, kind), getattr(whole, kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        ours, theirs = (c.optimizer["optimizer"]["state"] for c in (killed, whole))
        assert all(torch.equal(ours[k][kind], theirs[k][kind]) for k in theirs)
    rows = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    ]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["global_step"] for row in rows[1]] == list(range(1, NUM_STEPS + 1))
