import threading
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.errors import StorageError
from pipeline.patience import Patience
from pipeline.storage import LocalStorage


class Stubborn(CheckpointStore):
    """Fails so many times, and waits until it is let go."""

    def __init__(self, root: Path, failures: int = 0) -> None:
        super().__init__(LocalStorage(str(root)), "t")
        object.__setattr__(self, "failures", failures)
        object.__setattr__(self, "may_write", threading.Event())

    def save(self, checkpoint: Checkpoint) -> None:
        self.may_write.wait()  # pyright: ignore[reportAttributeAccessIssue]
        if self.failures:  # pyright: ignore[reportAttributeAccessIssue]
            object.__setattr__(self, "failures", self.failures - 1)  # pyright: ignore
            raise StorageError("Cannot write. Wait.")
        super().save(checkpoint)


def make_checkpoint(step: int, weight: torch.Tensor) -> Checkpoint:
    state = {"w": weight}
    optimizer = {"optimizer": {"state": [weight]}, "scaler": {}}
    return Checkpoint(step, state, state, optimizer, [{"global_step": step}])


def test_what_is_written_is_the_state_when_it_was_given(tmp_path: Path) -> None:
    store = Stubborn(tmp_path)
    writer = CheckpointWriter(store, Patience(0))
    weight = torch.ones(3)
    checkpoint = make_checkpoint(1, weight)
    writer.write(checkpoint)
    weight.zero_()
    checkpoint.history.append({"global_step": 2})  # pyright: ignore[reportAttributeAccessIssue]
    store.may_write.set()  # pyright: ignore[reportAttributeAccessIssue]
    writer.wait()
    saved = store.load(1)
    assert saved is not None
    assert saved.history == [{"global_step": 1}]
    assert torch.equal(saved.model["w"], torch.ones(3))
    assert torch.equal(saved.optimizer["optimizer"]["state"][0], torch.ones(3))
    writer.close()


def test_a_storage_that_comes_back_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, pauses = Stubborn(tmp_path, failures=5), []
    store.may_write.set()  # pyright: ignore[reportAttributeAccessIssue]
    writer = CheckpointWriter(store, Patience(120, pauses.append, lambda: sum(pauses)))
    writer.write(make_checkpoint(1, torch.ones(3)))
    writer.wait()
    assert store.steps() == [1]
    assert pauses == [1, 2, 4, 8, 15]
    assert "The checkpoint at step 1 is not written yet, next try in 8 s" in caplog.text
    writer.close()


def test_a_storage_that_stays_away_is_an_error_at_the_next_checkpoint(tmp_path: Path) -> None:
    store, pauses = Stubborn(tmp_path, failures=1000), []
    store.may_write.set()  # pyright: ignore[reportAttributeAccessIssue]
    writer = CheckpointWriter(store, Patience(10, pauses.append, lambda: sum(pauses)))
    writer.write(make_checkpoint(1, torch.ones(3)))
    with pytest.raises(StorageError, match="Cannot write"):
        writer.write(make_checkpoint(2, torch.ones(3)))
    assert pauses == [1, 2, 4, 3]
    writer.close()


def test_the_time_that_attempts_take_counts(tmp_path: Path) -> None:
    seconds = iter(range(0, 1000, 30))  # an end point that answers after half a minute, or never
    pauses: list[float] = []
    patience = Patience(100, pauses.append, lambda: next(seconds))

    def fail() -> None:
        raise StorageError("Cannot write. Wait.")

    with pytest.raises(StorageError):
        patience.until_done(fail, "It is not written")
    assert pauses == [1, 2, 4]
