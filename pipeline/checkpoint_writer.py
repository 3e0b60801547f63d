"""Writing checkpoints behind the training."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch import Tensor

from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.patience import Patience


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
