"""Writing checkpoints behind the training, and waiting for a storage that is away."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.errors import StorageError

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 15.0

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Tries again what the storage refuses, for so many seconds since it was first tried.

    Args:
        seconds: until the last attempt begins.
        sleep: waits for so many seconds.
        clock: seconds.
    """

    seconds: float
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def until_done(self, action: Callable[[], T], what: str) -> T:
        """What an action gives, as soon as it does.

        Args:
            action: may raise StorageError, and may be called again.
            what: for the warning, as in "The checkpoint is not read yet".

        Raises:
            StorageError: of the last attempt.
        """
        ends, pause = self.clock() + self.seconds, 1.0
        while True:
            try:
                return action()
            except StorageError as error:
                if (left := ends - self.clock()) <= 0:
                    raise
                pause = min(pause, left)
                logger.warning("%s yet, next try in %.0f s: %s", what, pause, error)
                self.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)


class CheckpointWriter:
    """Writes checkpoints on a thread, one at a time, and tries again while the storage fails.

    Args:
        store: where they go.
        patience: with one that cannot be written.
    """

    def __init__(self, store: CheckpointStore, patience: Patience) -> None:
        self._store, self._patience = store, patience
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Takes a copy of the state and begins to write it, when the one before is written.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        self._writing = self._pool.submit(self._save, copy_to_host(checkpoint))

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            StorageError: what was, could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Ends the thread, without a word on what it was writing: `wait` tells that."""
        self._pool.shutdown(wait=True)

    def _save(self, checkpoint: Checkpoint) -> None:
        what = f"The checkpoint at step {checkpoint.global_step} is not written"
        self._patience.until_done(lambda: self._store.save(checkpoint), what)


def copy_to_host(checkpoint: Checkpoint) -> Checkpoint:
    """The same state in memory of its own, which training does not change."""
    return replace(
        checkpoint,
        model=_copy(checkpoint.model),
        ema=_copy(checkpoint.ema),
        optimizer=_copy(checkpoint.optimizer),
        history=list(checkpoint.history),
    )


def _copy(state: Any) -> Any:
    """Nested state with every tensor copied to the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state
