import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.storage import LocalStorage


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(LocalStorage(str(tmp_path)), "t")


def make_checkpoint(step: int) -> Checkpoint:
    weights = {"w": torch.full((3,), float(step))}
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3) * step
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return Checkpoint(step, weights, weights, optimizer.state_dict(), [{"loss": 1.0 / step}])


def test_loads_what_was_saved(store: CheckpointStore) -> None:
    saved = make_checkpoint(5)
    store.save(saved)
    loaded = store.load_latest(max_step=10)
    assert loaded is not None
    assert loaded.global_step == 5
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert torch.equal(
        loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"]
    )
    assert loaded.history == saved.history


def test_keeps_the_latest_two_up_to_the_one_saved(store: CheckpointStore) -> None:
    for step in (10, 20, 30, 40):
        store.save(make_checkpoint(step))
    assert store.steps() == [30, 40]
    store.save(make_checkpoint(5))  # a shorter training over the same series
    assert store.steps() == [5, 30, 40]


def test_takes_none_beyond_the_end(store: CheckpointStore) -> None:
    store.save(make_checkpoint(10))
    store.save(make_checkpoint(20))
    latest = store.load_latest(max_step=19)
    assert latest is not None
    assert latest.global_step == 10
    assert store.load_latest(max_step=9) is None


FILES = ("model", "ema", "optimizer", "metrics", "manifest")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2] + b"\xff" + content[len(content) // 2 + 1 :],
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"1", b"2"),
    ],
    ids=["one byte", "cut short", "other digits"],
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_skipped_with_a_warning(
    store: CheckpointStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    store.save(make_checkpoint(10))
    store.save(make_checkpoint(21))
    (path,) = (tmp_path / "t" / "checkpoints" / "000000021").glob(f"{name}*")
    content = path.read_bytes()
    if damage(content) == content:
        return  # there is no such digit in it
    path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        latest = store.load_latest(max_step=21)
    assert latest is not None
    assert latest.global_step == 10
    assert "checkpoint at step 21 in t is damaged" in caplog.text
    assert store.best_step() is None  # and looking for it harms nothing
    store.save(make_checkpoint(21))
    assert store.load(21) is not None


@pytest.mark.parametrize("key", ["files", "global_step", "environments", "sha256"])
def test_a_manifest_that_lacks_something_is_damaged(
    store: CheckpointStore, tmp_path: Path, key: str
) -> None:
    store.save(make_checkpoint(10))
    path = tmp_path / "t" / "checkpoints" / "000000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    assert store.load(10) is None


def test_what_a_kill_left_half_deleted_goes(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (10, 20):
        store.save(make_checkpoint(step))
    (tmp_path / "t" / "checkpoints" / "000000010" / "manifest.json").unlink()
    store.save(make_checkpoint(30))
    assert sorted(path.name for path in (tmp_path / "t" / "checkpoints").iterdir()) == [
        "000000020",
        "000000030",
    ]


def test_half_a_checkpoint_is_none(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(make_checkpoint(10))
    (tmp_path / "t" / "checkpoints" / "000000010" / "manifest.json").unlink()
    assert store.steps() == []
    assert store.load_latest(max_step=20) is None
