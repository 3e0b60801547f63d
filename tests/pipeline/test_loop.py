"""The loop without Ray: two gloo ranks against one process, resuming, and a moving EMA."""

import json
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.settings import Config
from pipeline.storage import LocalStorage
from pipeline.train import train_in_process, train_rank

STEPS = 24


@pytest.fixture
def data(tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a data set of 50 random images in the storage root `tmp_path`."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8)
    return write_data_set(LocalStorage(str(tmp_path)), pixels)


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(
        tiny_config, [f"train.num_steps={STEPS}", "train.checkpoint_every=8", "model.dropout=0.1"]
    )


def train(config: Config, tmp_path: Path, data: dict[str, Any], name: str) -> CheckpointStore:
    storage = LocalStorage(str(tmp_path))
    train_in_process(config, storage, name, data)
    return CheckpointStore(storage, name)


def load(store: CheckpointStore, step: int = STEPS) -> Any:
    checkpoint = store.load(step)
    assert checkpoint is not None
    return checkpoint


def test_the_same_run_twice_is_the_same_to_the_bit(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    one, two = (load(train(config, tmp_path, data, name)) for name in ("one", "two"))
    assert all(torch.equal(one.ema[name], two.ema[name]) for name in one.ema)
    assert one.history == two.history


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    whole = load(train(config, tmp_path, data, "whole"))
    stopped = config.model_copy(update={"train": config.train.model_copy(update={"num_steps": 16})})
    train(stopped, tmp_path, data, "parts")
    parts = load(train(config, tmp_path, data, "parts"))
    for kind in ("model", "ema"):
        ours, theirs = getattr(parts, kind), getattr(whole, kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert parts.history == whole.history
    for index, state in whole.optimizer["state"].items():
        assert torch.equal(parts.optimizer["state"][index]["exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [
            "diffusion.self_condition=true",
            "diffusion.learned_variance=true",
            "diffusion.offset_noise=0.1",
            "train.timestep_draw=stratified",
            "model.norm=rms",
            "model.memory_kv=2",
            'model.attention=["linear", "full"]',
        ],
    ],
)
def test_two_ranks_equal_one_process(
    settings: list[str], tiny_config: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    steps = [f"train.num_steps={STEPS}", "train.checkpoint_every=8"]
    config = load_config(tiny_config, [*steps, *settings])
    one = load(train(config, tmp_path, data, "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = (config.model_dump_json(), str(tmp_path), "two", json.dumps(data), port)
    ranks = [context.Process(target=train_rank, args=(rank, 2, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    two = load(CheckpointStore(LocalStorage(str(tmp_path)), "two"))
    for name in one.ema:
        assert torch.allclose(one.ema[name], two.ema[name], atol=1e-5), name
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_it_learns_and_the_ema_moves(config: Config, tmp_path: Path, data: dict[str, Any]) -> None:
    longer = config.model_copy(update={"train": config.train.model_copy(update={"num_steps": 100})})
    checkpoint = load(train(longer, tmp_path, data, "x"), 100)
    losses = [entry["loss"] for entry in checkpoint.history]
    assert losses[-1] < 0.9 * losses[0]
    start = load(train(config, tmp_path, data, "start"))
    moved = [not torch.equal(checkpoint.ema[n], start.ema[n]) for n in start.ema]
    assert all(moved)
