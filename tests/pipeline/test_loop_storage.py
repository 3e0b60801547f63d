"""The loop while its storage is away, full, or about to be: what is lost, and what is said."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import loop, training_views
from pipeline import train as pipeline_train
from pipeline.batches import BatchMaker
from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.config import load_config
from pipeline.errors import StorageError, TrainingError
from pipeline.loop import Hooks
from pipeline.patience import Patience
from pipeline.settings import Config, TrainConfig
from pipeline.settings.train import MAX_PATIENCE_S
from pipeline.storage import LocalStorage
from pipeline.train import process_group, train_in_process
from pipeline.training_views import TrainingViews

from .test_loop import assert_same_to_the_bit, equal, poisoned, settings_of
from .test_training_views import read_events

STEPS = 24
MARGIN_S = 120  # of the group's timeout, for the attempts themselves


@pytest.fixture
def data(tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8)
    return write_data_set(LocalStorage(str(tmp_path / "root")), pixels)


@pytest.fixture
def config(tiny_config: Path) -> Config:
    steps = [f"train.num_steps={STEPS}", "train.checkpoint_every=8", "train.log_every=4"]
    return load_config(tiny_config, [*steps, "model.dropout=0.1"])


@pytest.fixture
def train(config: Config, tmp_path: Path, data: dict[str, Any]) -> Callable[..., CheckpointStore]:
    """Trains in a directory of the root, with other settings and hooks; its checkpoints."""
    storage = LocalStorage(str(tmp_path / "root"))

    def run(directory: str, hooks: Hooks | None = None, **settings: Any) -> CheckpointStore:
        changed = settings_of(config, **settings)
        train_in_process(changed, storage, directory, data, hooks=hooks)
        return CheckpointStore(storage, directory)

    return run


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def load(store: CheckpointStore, step: int = STEPS) -> Checkpoint:
    checkpoint = store.load(step)
    assert checkpoint is not None
    return checkpoint


class Outage:
    """The root goes after a step, and is back when the simulated clock says so.

    It becomes a link, which goes and comes at once: no write can fall between.
    """

    def __init__(self, root: Path, at_step: int, seconds: float) -> None:
        self.root, self.at_step, self.seconds = root, at_step, seconds
        self.there, self.away = root.with_name("there"), root.with_name("away")
        self.away.touch()  # what reads or writes below a file fails
        self.pauses: list[float] = []
        root.rename(self.there)
        self.link_to(self.there)

    def link_to(self, target: Path) -> None:
        link = self.root.with_name("link")
        link.symlink_to(target)
        link.replace(self.root)

    def on_row(self, row: dict[str, Any], first_step: int) -> None:
        if row["global_step"] == self.at_step:
            self.link_to(self.away)

    def patience(self, seconds: float) -> Patience:
        return Patience(seconds, self.sleep, lambda: sum(self.pauses))

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if sum(self.pauses) >= self.seconds:
            self.link_to(self.there)


def test_storage_that_is_away_for_a_minute_costs_nothing(
    train: Callable[..., CheckpointStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = load(train("whole"))
    # Before the first checkpoint, so that no write is under way when the root goes.
    outage = Outage(tmp_path / "root", at_step=4, seconds=60)
    monkeypatch.setattr(loop, "Patience", outage.patience)
    store = train("away", Hooks(on_row=outage.on_row))
    assert outage.pauses == [1, 2, 4, 8, 15, 15, 15]
    assert "The checkpoint at step 8 is not written yet, next try in 15 s: Cannot" in caplog.text
    assert store.steps() == [16, 24]
    assert_same_to_the_bit(load(store), whole)


def test_storage_that_stays_away_is_an_error_and_what_is_there_goes_on(
    train: Callable[..., CheckpointStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(train("whole"))
    train("x", num_steps=8)
    outage = Outage(tmp_path / "root", at_step=12, seconds=1000)
    monkeypatch.setattr(loop, "Patience", outage.patience)
    with pytest.raises(StorageError, match=r"Cannot .*Check the path"):
        train("x", Hooks(on_row=outage.on_row), storage_patience_s=60)
    assert sum(outage.pauses) == 60
    outage.seconds = 0
    outage.sleep(0)
    store = CheckpointStore(LocalStorage(str(tmp_path / "root")), "x")
    assert store.steps() == [8]
    assert_same_to_the_bit(load(train("x")), whole)


def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_goes_on(
    train: Callable[..., CheckpointStore],
    tmp_path: Path,
    small_disk: Callable[[Path, int], None],
) -> None:
    whole = load(train("whole"))
    directory = tmp_path / "root" / "full"
    directory.mkdir()
    small_disk(directory, 64 << 20)
    before = load(train("full", num_steps=8), 8)
    usage = os.statvfs(directory)
    used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    small_disk(directory, used + 2 * usage.f_frsize)
    with pytest.raises(StorageError, match=r"Cannot write .*No space left on device. Check"):
        train("full", storage_patience_s=0)
    store = CheckpointStore(LocalStorage(str(tmp_path / "root")), "full")
    assert store.steps() == [8]
    assert_same_to_the_bit(load(store, 8), before)
    small_disk(directory, 64 << 20)
    assert_same_to_the_bit(load(train("full")), whole)
    assert list(directory.rglob(".staged-*")) == []


def test_a_notice_that_the_node_goes_makes_a_checkpoint_at_once(
    train: Callable[..., CheckpointStore],
) -> None:
    whole = load(train("whole"))
    asked: list[bool] = []

    def wants_checkpoint() -> bool:
        asked.append(len(asked) >= 2)  # from the third step on, in the middle of a row
        return asked[-1]

    def stop(row: dict[str, Any], first_step: int) -> None:
        if row["global_step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("x", Hooks(on_row=stop, wants_checkpoint=wants_checkpoint))
    first_steps: list[int] = []
    store = train("x", Hooks(on_row=lambda row, first_step: first_steps.append(first_step)))
    assert set(first_steps) == {3}
    done = load(store)
    assert [row["global_step"] for row in done.history] == [3, 4, 8, 12, 16, 20, 24]
    assert equal(done.model, whole.model)
    assert equal(done.optimizer, whole.optimizer)


def test_who_is_told_to_end_does_so_with_a_checkpoint(
    train: Callable[..., CheckpointStore],
) -> None:
    whole = load(train("whole"))
    asked = itertools.count(1)
    store = train("x", Hooks(is_told_to_end=lambda: next(asked) >= 3))  # in the middle of a row
    assert store.steps() == [3]
    done = load(train("x", Hooks(is_told_to_end=lambda: False)))
    assert [row["global_step"] for row in done.history] == [3, 4, 8, 12, 16, 20, 24]
    assert equal(done.model, whole.model)
    assert equal(done.optimizer, whole.optimizer)


def test_one_notice_makes_one_checkpoint(
    train: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = CheckpointStore.save
    monkeypatch.setattr(
        CheckpointStore, "save", lambda self, c: saved.append(c.global_step) or save(self, c)
    )
    steps: list[int] = []
    train(
        "x",
        Hooks(
            on_row=lambda row, first_step: steps.append(row["global_step"]),
            wants_checkpoint=lambda: True,
        ),
    )
    assert saved == [1, 8, 16, 24]


@pytest.mark.parametrize("trouble", ["away", "full"])
def test_what_is_for_the_eye_holds_nobody_up(
    train: Callable[..., CheckpointStore],
    config: Config,
    tmp_path: Path,
    small_disk: Callable[[Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    """Rows, pictures and TensorBoard's events while nothing can be written for a while."""
    root = tmp_path / "root"
    monkeypatch.setattr(training_views, "WRITE_EVERY_S", 0.0)
    monkeypatch.setattr(training_views, "PROGRESS_EVERY_S", 0.0)
    shown = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"num_steps": 2})}
    )
    views = TrainingViews(shown, LocalStorage(str(root)), "x", 0.0)
    outage = Outage(root, at_step=4, seconds=3)
    monkeypatch.setattr(loop, "Patience", outage.patience)
    directory = root / "x"
    if trouble == "full":
        directory.mkdir()
        small_disk(directory, 64 << 20)

    def on_row(row: dict[str, Any], first_step: int) -> None:
        views.on_row(row, first_step)
        if trouble == "away":
            outage.on_row(row, first_step)
        elif row["global_step"] in (4, 16):
            wait_until((directory / "progress.json").exists)  # the events are there before it
            usage = os.statvfs(directory)
            used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
            room = (64 << 20) if row["global_step"] == 16 else used + usage.f_frsize
            small_disk(directory, room)

    hooks = Hooks(on_row=on_row, on_samples=views.on_samples)
    # On the full disk there is room again before the first checkpoint.
    store = train("x", hooks, sample_every=6, checkpoint_every=8 if trouble == "away" else 24)
    views.close()
    assert load(store).global_step == STEPS
    (events,) = (directory / "tensorboard").iterdir()
    losses = [step for tag, step, _ in read_events(events.read_bytes()) if tag == "train/loss"]
    assert losses == [4, 8, 12, 16, 20, 24]
    assert json.loads((directory / "progress.json").read_text())["global_step"] == STEPS


@pytest.mark.parametrize("is_conditional", [False, True])
def test_workers_that_start_while_the_storage_is_away_wait_for_it(
    tiny_config: Path,
    tmp_path: Path,
    write_data_set: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    is_conditional: bool,
) -> None:
    storage = LocalStorage(str(tmp_path / "root"))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8)
    data = write_data_set(storage, pixels, [k % 3 for k in range(50)])
    settings = ["train.checkpoint_every=8", f"model.class_conditional={is_conditional}".lower()]
    config = load_config(tiny_config, [*settings, f"train.num_steps={STEPS}"])

    def train(directory: str, hooks: Hooks | None = None, **settings: Any) -> CheckpointStore:
        train_in_process(settings_of(config, **settings), storage, directory, data, hooks=hooks)
        return CheckpointStore(storage, directory)

    whole = load(train("whole"))
    train("x", num_steps=16)
    outage = Outage(tmp_path / "root", at_step=0, seconds=60)
    outage.on_row({"global_step": 0}, 0)
    for module in (loop, pipeline_train):
        monkeypatch.setattr(module, "Patience", outage.patience)
    first_steps: list[int] = []
    store = train("x", Hooks(on_row=lambda row, first_step: first_steps.append(first_step)))
    assert set(first_steps) == {16}
    assert_same_to_the_bit(load(store), whole)


def test_a_batch_that_fails_while_the_storage_is_away_goes_back_to_the_checkpoint(
    train: Callable[..., CheckpointStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchMaker, "make", poisoned(BatchMaker.make, {13}))
    whole = load(train("whole"))
    outage = Outage(tmp_path / "root", at_step=12, seconds=30)
    monkeypatch.setattr(loop, "Patience", outage.patience)
    rows: list[int] = []

    def on_row(row: dict[str, Any], first_step: int) -> None:
        rows.append(row["global_step"])
        if rows.count(12) == 1:
            outage.on_row(row, first_step)

    done = load(train("x", Hooks(on_row=on_row)))
    assert rows == [4, 8, 12, 12, 16, 20, 24]  # not from the beginning
    assert_same_to_the_bit(done, whole)


def test_a_latest_checkpoint_that_cannot_be_read_costs_the_steps_since_the_one_before(
    train: Callable[..., CheckpointStore],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = load(train("whole"))
    train("x", num_steps=16)
    pauses: list[float] = []
    patience = partial(Patience, sleep=pauses.append, clock=lambda: sum(pauses))
    monkeypatch.setattr(loop, "Patience", patience)
    read = LocalStorage.read

    def fail(self: LocalStorage, path: str) -> bytes:
        if "x/checkpoints/000000016/model" in path:
            raise StorageError("Cannot read it: Input/output error.")
        return read(self, path)

    monkeypatch.setattr(LocalStorage, "read", fail)
    first_steps: list[int] = []
    store = train("x", Hooks(on_row=lambda row, first_step: first_steps.append(first_step)))
    assert set(first_steps) == {8}
    assert sum(pauses) == 120  # and no second time, for the checkpoint that takes its place
    assert "The checkpoint at step 16 in x cannot be read; the one before it" in caplog.text
    monkeypatch.setattr(LocalStorage, "read", read)
    assert_same_to_the_bit(load(store), whole)
    assert store.steps() == [16, 24]


def test_where_no_checkpoint_can_be_read_nothing_begins_anew(
    train: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("x", num_steps=16)
    read = LocalStorage.read

    def fail(self: LocalStorage, path: str) -> bytes:
        if "x/checkpoints" in path:
            raise StorageError("Cannot read it: Input/output error.")
        return read(self, path)

    monkeypatch.setattr(LocalStorage, "read", fail)
    rows: list[Any] = []
    with pytest.raises(StorageError, match="Input/output"):
        train("x", Hooks(on_row=lambda *row: rows.append(row)), storage_patience_s=0)
    assert rows == []


@pytest.mark.parametrize("patience_s", [120.0, MAX_PATIENCE_S])
def test_the_others_wait_as_long_as_rank_0_may_be_patient(
    train: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    """The storage goes twice while a step is made good, and comes back as late as may be."""
    pauses: list[float] = []
    patience = partial(Patience, sleep=pauses.append, clock=lambda: sum(pauses))
    monkeypatch.setattr(loop, "Patience", patience)
    monkeypatch.setattr(BatchMaker, "make", poisoned(BatchMaker.make, {13}))
    went: dict[str, float] = {}

    def goes(verb: str) -> None:
        original = getattr(LocalStorage, verb)

        def fail(self: LocalStorage, path: str, *more: Any) -> Any:
            if "x/checkpoints/000000012/" in path:
                began = went.setdefault(verb, sum(pauses))
                if sum(pauses) < began + patience_s:
                    raise StorageError("Cannot do it: no route to host.")
            return original(self, path, *more)

        monkeypatch.setattr(LocalStorage, verb, fail)

    goes("create")
    goes("read")
    store = train("x", checkpoint_every=12, storage_patience_s=patience_s)
    assert load(store).skipped == (13,)
    assert went.keys() == {"create", "read"}
    config = TrainConfig(storage_patience_s=patience_s)
    assert sum(pauses) == 2 * patience_s
    assert sum(pauses) + MARGIN_S < config.group_timeout_s


def test_the_group_is_given_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda: None)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, timeout: told.append(timeout)
    )
    config = TrainConfig(storage_patience_s=MAX_PATIENCE_S)
    with process_group(config):
        pass
    assert told == [timedelta(seconds=config.group_timeout_s)]


@pytest.mark.parametrize(("backend", "ends"), [("gloo", 1), ("nccl", 0)])
def test_a_rank_that_fails_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, backend: str, ends: int
) -> None:
    """To end its group NCCL waits for them, and they wait for this rank."""
    ended: list[None] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(None))
    with pytest.raises(TrainingError), process_group(TrainConfig(), backend):
        raise TrainingError("of this rank")
    assert len(ended) == ends
    with process_group(TrainConfig(), backend):
        pass
    assert len(ended) == ends + 1


class FlakyStorage(LocalStorage):
    """Does not give back the checkpoint of one step the first times that it is asked."""

    def __init__(self, uri: str, step: int, times: int) -> None:
        super().__init__(uri)
        self.name, self.times_left = f"{step:09d}/", times

    def read(self, path: str) -> bytes:
        if self.name in path and self.times_left:
            self.times_left -= 1
            raise StorageError("Reset by peer. Try again.")
        return super().read(path)


def test_a_rewind_goes_back_though_a_later_checkpoint_can_be_read_again(
    train: Callable[..., CheckpointStore],
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BatchMaker, "make", poisoned(BatchMaker.make, {9, 12}))
    settings = {"keep_every": 8, "max_rewinds": 4, "storage_patience_s": 0}
    expected = train("expected", **settings)
    root = tmp_path / "root"
    shutil.copytree(root / "expected", root / "killed")
    shutil.rmtree(next((root / "killed" / "checkpoints").glob(f"*{STEPS}")))
    storage = FlakyStorage(str(root), step=16, times=2)
    train_in_process(settings_of(config, **settings), storage, "killed", data)
    assert not storage.times_left
    resumed = load(CheckpointStore(storage, "killed"))
    assert (list(resumed.skipped), resumed.num_rewinds) == ([9, 12], 2)
    assert_same_to_the_bit(resumed, load(expected))


def test_a_root_that_is_gone_at_a_rewind_is_waited_for(
    train: Callable[..., CheckpointStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmounted directory looks like one without checkpoints."""
    root, away = tmp_path / "root", tmp_path / "away"
    make = poisoned(BatchMaker.make, {11})
    monkeypatch.setattr(BatchMaker, "make", make)
    expected = load(train("expected"))
    unmounted: list[str] = []

    def unmount(self: BatchMaker, number: int, num_rewinds: int) -> Any:
        if number == 11 and directory not in unmounted:
            deadline = time.monotonic() + 60
            while not (root / directory / "metrics.jsonl").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)  # until the first checkpoint is written: that is the last of it
            root.rename(away)
            unmounted.append(directory)
        return make(self, number, num_rewinds)

    def mount(_: float) -> None:
        assert not root.exists()
        away.rename(root)

    monkeypatch.setattr(BatchMaker, "make", unmount)
    monkeypatch.setattr(loop, "Patience", partial(Patience, sleep=mount))
    directory = "waits"
    assert_same_to_the_bit(load(train(directory)), expected)
    directory = "ends"
    with pytest.raises(StorageError, match="are gone while training goes on"):
        train(directory, storage_patience_s=0)
    assert unmounted == ["waits", "ends"]
