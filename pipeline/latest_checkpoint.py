"""The checkpoint that a training goes on from: the same one on every rank."""

from dataclasses import dataclass

import torch.distributed as dist

from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.errors import StorageError, TrainingError
from pipeline.patience import Patience


@dataclass(frozen=True)
class LatestCheckpoint:
    """Finds it, and waits for a storage that is away.

    Every rank calls the methods alike.

    Args:
        store: the training's.
        patience: with the storage.
        rank: of this process.
        world_size: number of ranks.
    """

    store: CheckpointStore
    patience: Patience
    rank: int
    world_size: int

    def load(self, max_step: int, *, must_exist: bool) -> Checkpoint | None:
        """The latest up to a step; rank 0 says which: so all agree.

        Args:
            max_step: of the checkpoint, at most.
            must_exist: whether there must be some, as where this process has made one.

        Raises:
            StorageError: it cannot be read, or all are gone that were there.
        """
        checkpoint = None
        if self.rank == 0:
            try:
                checkpoint = self.patience.until_done(
                    lambda: self._look(max_step, must_exist), "The latest checkpoint is not read"
                )
            except StorageError:  # it may be this one alone
                checkpoint = self._look(max_step, must_exist, passes_over_unreadable=True)
        if self.world_size == 1:
            return checkpoint
        chosen = [checkpoint.global_step if checkpoint else -1]
        dist.broadcast_object_list(chosen, src=0)
        if self.rank != 0 and chosen[0] >= 0:
            checkpoint = self.patience.until_done(
                lambda: self._load_chosen(chosen[0]), "The latest checkpoint is not read"
            )
        return checkpoint

    def refuse_damaged(self) -> None:
        """Ends a training of which there are checkpoints, and none to go on from.

        Raises:
            TrainingError: so it is.
        """
        are_damaged = [self.rank == 0 and self.store.has_passed_over]
        if self.world_size > 1:
            dist.broadcast_object_list(are_damaged, src=0)
        if are_damaged[0]:
            raise TrainingError(
                f"The checkpoints below {self.store.directory} are damaged, all of them. Bring one "
                "back from a copy, or delete them to have the same command begin anew."
            )

    def _look(
        self, max_step: int, must_exist: bool, *, passes_over_unreadable: bool = False
    ) -> Checkpoint | None:
        if must_exist and not self.store.steps():  # as where nothing is mounted
            raise StorageError(
                f"The checkpoints below {self.store.directory} are gone while training goes on. "
                "See that storage.root is mounted, and run the same command again."
            )
        return self.store.load_latest(max_step, passes_over_unreadable=passes_over_unreadable)

    def _load_chosen(self, step: int) -> Checkpoint:
        """What rank 0 has read."""
        if (checkpoint := self.store.load(step)) is None:
            raise StorageError(
                f"Rank {self.rank} cannot read the checkpoint at step {step} that rank 0 read. Set "
                "storage.root to a place that every node of the cluster shares."
            )
        return checkpoint
