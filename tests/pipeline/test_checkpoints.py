import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.errors import StorageError
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


def test_saving_again_does_what_the_first_time_left_undone(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        store.save(make_checkpoint(step))

    def refuse(self: CheckpointStore, lines: bytes) -> None:
        raise StorageError("Cannot write. Wait.")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_show", refuse)
        with pytest.raises(StorageError):
            store.save(make_checkpoint(30))
    store.save(make_checkpoint(30))
    assert store.steps() == [20, 30]
    shown = json.loads((tmp_path / "t" / "metrics.jsonl").read_text())
    assert shown == make_checkpoint(30).history[0]


def test_a_loss_that_is_not_finite_is_not_the_best(store: CheckpointStore) -> None:
    for step, loss in enumerate((float("nan"), 0.5, 0.9, 0.8, 0.7), 1):
        rows = [{"global_step": step, "validation_loss": loss}]
        store.save(replace(make_checkpoint(step), history=rows))
    assert store.steps() == [2, 4, 5]


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


class Root:
    """A root that counts what it is asked and cannot read some paths."""

    def __init__(self, directory: Path, unreadable: str = "no such part") -> None:
        self._storage = LocalStorage(str(directory))
        self.asked = Counter[str]()
        self.unreadable = unreadable

    def read(self, path: str) -> bytes:
        self.asked["read"] += 1
        if self.unreadable in path:
            raise StorageError("Cannot read it: Input/output error.")
        return self._storage.read(path)

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> Any:
            self.asked[name] += 1
            return getattr(self._storage, name)(*arguments)

        return ask


def test_dropping_asks_no_more_the_more_are_kept(tmp_path: Path) -> None:
    root = Root(tmp_path)
    store = CheckpointStore(root, "t", keep_every=10)  # pyright: ignore[reportArgumentType]
    asked = []
    for step in range(10, 130, 10):
        root.asked.clear()
        store.save(make_checkpoint(step))
        asked.append(dict(root.asked))
    assert asked == [asked[0]] * 12
    assert asked[0]["list"] == 1
    assert "read" not in asked[0]

    again = CheckpointStore(root, "t", keep_every=10)  # pyright: ignore[reportArgumentType]
    for step, reads in ((130, 12), (140, 0)):  # what another process wrote is read once
        root.asked.clear()
        again.save(make_checkpoint(step))
        assert root.asked["read"] == reads
    assert len(store.steps()) == 14


def test_what_another_process_saved_may_be_the_best(tmp_path: Path) -> None:
    def save(step: int, loss: float) -> None:
        row = {"global_step": step, "validation_loss": loss}
        store = CheckpointStore(LocalStorage(str(tmp_path)), "t")
        store.save(replace(make_checkpoint(step), history=[row]))

    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.0)):
        save(step, loss)
    assert CheckpointStore(LocalStorage(str(tmp_path)), "t").steps() == [20, 30, 40]


@pytest.mark.parametrize("name", [".DS_Store", "000000020.tmp", "notes", "20", "-00000020"])
def test_what_is_no_step_is_passed_over_and_stays(
    store: CheckpointStore, tmp_path: Path, name: str
) -> None:
    store.save(make_checkpoint(10))
    (tmp_path / "t" / "checkpoints" / name).write_bytes(b"x")
    assert store.steps() == [10]
    latest = store.load_latest(max_step=30)
    assert latest is not None
    assert latest.global_step == 10
    for step in (20, 30, 40):
        store.save(make_checkpoint(step))
    assert store.steps() == [30, 40]
    assert (tmp_path / "t" / "checkpoints" / name).exists()


def test_one_that_cannot_be_read_is_passed_over_when_that_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Root(tmp_path)
    store = CheckpointStore(root, "t")  # pyright: ignore[reportArgumentType]
    for step in (10, 20):
        store.save(make_checkpoint(step))
    root.unreadable = "000000020/ema"
    with pytest.raises(StorageError, match="Input/output"):
        store.load_latest(max_step=20)
    latest = store.load_latest(max_step=20, passes_over_unreadable=True)
    assert latest is not None
    assert latest.global_step == 10
    assert "checkpoint at step 20 in t cannot be read; the one before it is tried" in caplog.text
    root.unreadable = "/ema"
    with pytest.raises(StorageError, match="Input/output"):
        store.load_latest(max_step=20, passes_over_unreadable=True)

    root.unreadable = "000000020/ema"  # whoever comes to that step again writes it anew
    store.save(make_checkpoint(20))
    root.unreadable = "no such part"
    assert store.load(20) is not None


def test_one_that_was_passed_over_is_not_kept_as_one_to_go_back_to(tmp_path: Path) -> None:
    root = Root(tmp_path)
    store = CheckpointStore(root, "t")  # pyright: ignore[reportArgumentType]
    for step in (10, 20):
        store.save(make_checkpoint(step))
    root.unreadable = "000000020/ema"
    store.load_latest(max_step=20, passes_over_unreadable=True)
    for step in (15, 25):
        store.save(make_checkpoint(step))
    assert store.steps() == [15, 25]


def damage(tmp_path: Path, step: int) -> None:
    (path,) = (tmp_path / "t" / "checkpoints" / f"{step:09d}").glob("model*")
    path.write_bytes(b"x")


def test_one_in_place_of_a_damaged_one_is_kept_though_deleting_that_failed_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(LocalStorage(str(tmp_path)), "t")
    for step in (10, 20):
        store.save(make_checkpoint(step))
    damage(tmp_path, 20)
    assert store.load_latest(max_step=20) is not None  # that at step 10
    real = LocalStorage.delete

    def fail(self: LocalStorage, path: str) -> None:
        if path.endswith("000000020"):
            monkeypatch.setattr(LocalStorage, "delete", real)
            raise StorageError("away for a moment")
        real(self, path)

    monkeypatch.setattr(LocalStorage, "delete", fail)
    with pytest.raises(StorageError, match="away"):
        store.save(make_checkpoint(20))
    store.save(make_checkpoint(20))
    assert store.steps() == [10, 20]
    assert store.load(20) is not None


def test_one_in_place_of_a_damaged_one_half_deleted_is_whole(tmp_path: Path) -> None:
    store = CheckpointStore(LocalStorage(str(tmp_path)), "t")
    store.save(make_checkpoint(20))
    damage(tmp_path, 20)
    # Killed then, when it was to be replaced, between its manifest and its files.
    (tmp_path / "t" / "checkpoints" / "000000020" / "manifest.json").unlink()
    after = CheckpointStore(LocalStorage(str(tmp_path)), "t")
    after.save(make_checkpoint(20))
    assert after.load(20) is not None


def test_a_loss_of_another_step_is_not_its_own() -> None:
    rows = [{"global_step": 20, "validation_loss": 0.1}]
    assert replace(make_checkpoint(20), history=rows).validation_loss == 0.1
    assert replace(make_checkpoint(30), history=rows).validation_loss is None
