"""The training loop. It knows no Ray: a rank, a process group, items, and hooks.

Ray Train (`train.py`), a single process and `torchrun` are adapters around it. A step is a
function of the config and its number: which samples, which noise, which mirrored (`batches.py`).
So a run that was killed and resumed equals one that was not, to the bit on a CPU with the same
number of ranks and threads.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from diffusion_core import Diffusion
from pipeline.batches import Batch, BatchMaker, check_ranks, iter_batches
from pipeline.checkpoint_writer import CheckpointWriter, copy_to_host
from pipeline.checkpoints import Checkpoint, CheckpointStore, Row
from pipeline.errors import StorageError, TrainingError
from pipeline.host import keep_freed_memory
from pipeline.latest_checkpoint import LatestCheckpoint
from pipeline.learner import Learner, learning_rate
from pipeline.loader import keyed_seed
from pipeline.meter import Meter
from pipeline.order import make_order
from pipeline.patience import Patience
from pipeline.precision import gather_environment, say_changes
from pipeline.settings import TrainConfig
from pipeline.shards import Items
from pipeline.stopwatch import Stopwatch
from pipeline.validation import validation_loss

logger = logging.getLogger(__name__)

ASK_EVERY_S = 5.0  # whether a checkpoint is wanted: a node that goes gives notice of 30 s or more


@dataclass(frozen=True)
class Hooks:
    """What the loop tells, and asks.

    Args:
        on_row: on rank 0, a row of metrics and the step that this process began with.
        on_samples: on rank 0 every `sample_every` steps, the step and the EMA network.
        on_fid: on rank 0 every `fid_every` steps, the step and the EMA network.
        goes_on: on every rank every `fid_every` steps, with the step: whether training goes on
            after it. All ranks must get the same answer.
        wants_checkpoint: on every rank equally often, every few seconds: whether this process is
            about to be ended. A checkpoint is made when it first says so.
        is_told_to_end: on every rank equally often, every few seconds: whether this process was
            told to end. Where one was, all ranks make a checkpoint and end before the last step;
            without one where the weights are not finite just then.
    """

    on_row: Callable[[Row, int], None] = lambda row, first_step: None
    on_samples: Callable[[int, nn.Module], None] = lambda step, model: None
    on_fid: Callable[[int, nn.Module], None] = lambda step, model: None
    goes_on: Callable[[int], bool] = lambda step: True
    wants_checkpoint: Callable[[], bool] = lambda: False
    is_told_to_end: Callable[[], bool] | None = None


def train_loop(
    config: TrainConfig,
    model: nn.Module,
    diffusion: Diffusion,
    items: Items,
    store: CheckpointStore,
    *,
    validation: Items | None = None,
    shuffle_window: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    hooks: Hooks | None = None,
) -> list[Row]:
    """Trains up to `config.num_steps`, from the latest checkpoint there is before it.

    Every rank calls it with the same arguments but its rank; with more than one, the default
    process group must be up.

    Args:
        config: the training settings.
        model: the network, on the CPU; the loop moves it.
        diffusion: the process.
        items: the training split.
        store: where checkpoints go; rank 0 writes.
        validation: the validation split, needed for `config.validate_every`.
        shuffle_window: items that are shuffled together; None: all of them.
        rank: of this process.
        world_size: number of processes.
        device: to train on; the CPU when not given.
        hooks: told and asked on the way.

    Returns:
        The rows of metrics, one for `config.log_every` steps; the last is of an earlier step than
        `config.num_steps` where a hook ended the training.

    Raises:
        ConfigError: there are more ranks than can share a batch.
        TrainingError: the loss was not finite, more often than `config.max_rewinds`.
        StorageError: a checkpoint cannot be written or read.
    """
    check_ranks(config, world_size)
    order = make_order(
        seed=config.seed,
        counts=items.counts,
        global_batch_size=config.global_batch_size,
        shuffle_window=shuffle_window,
    )
    batches = BatchMaker(config, diffusion, items, order, rank, world_size)
    training = _Training(
        config, model, diffusion, batches, store, validation, device, hooks or Hooks()
    )
    try:
        return training.run()
    finally:
        training.writer.close()


class _Training:
    """The state of one rank while it trains."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        diffusion: Diffusion,
        batches: BatchMaker,
        store: CheckpointStore,
        validation: Items | None,
        device: torch.device | None,
        hooks: Hooks,
    ) -> None:
        keep_freed_memory()
        self.config, self.store, self.validation = config, store, validation
        self.batches, self.hooks = batches, hooks
        self.rank, self.world_size = batches.rank, batches.world_size
        self.device = device or torch.device("cpu")
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams and collectives are of the current one
        self.environments: list[dict[str, Any]] = []
        self.diffusion = diffusion.to(self.device)
        self.watch = Stopwatch()
        self.learner = Learner(
            config, model, self.diffusion, self.device, self.world_size, self.watch
        )
        self.meter = Meter(diffusion.num_train_timesteps, self.device)
        self.patience = Patience(config.storage_patience_s)
        self.writer = CheckpointWriter(store, self.patience)
        self.latest = LatestCheckpoint(store, self.patience, self.rank, self.world_size)
        self.step, self.first_step, self.num_rewinds = 0, 0, 0
        self.ask_every, self.is_asked_to_save = 1, False
        self.is_ended = False  # before its last step, by who watches it
        self.begun: Checkpoint | None = None  # the state to go back to before there is another
        self.num_saved = 0
        self.skipped: list[int] = []
        self.history: list[Row] = []

    def run(self) -> list[Row]:
        config = self.config
        self._resume()
        self.first_step = self.step
        if self.step < config.num_steps:
            self._warm_up()
            self._note_environment()
        self.learner.model.train()
        self.watch.take()
        batches = self._iter_batches()
        while self.step < config.num_steps and not self.is_ended:
            number, batch = next(batches)
            self.watch.mark("data")
            torch.manual_seed(self._dropout_seed(number))
            is_learned = self.learner.learn(batch, self.step, self.meter)
            self.watch.mark("compute")
            if is_learned:
                self.step += 1
                if self._report():
                    continue
                self.step -= 1
            self._rewind(number, is_learned)
            self.watch.mark("checkpoint")
            batches.close()
            batches = self._iter_batches()
        self.writer.wait()
        return self.history

    def _resume(self) -> None:
        """From the latest checkpoint, if there is one."""
        checkpoint = self._load_latest(self.config.num_steps)
        if checkpoint is None:
            self.latest.refuse_damaged()
            self.begun = copy_to_host(self._state())
            return
        self._restore(checkpoint)
        self.skipped, self.num_rewinds = list(checkpoint.skipped), checkpoint.num_rewinds
        self.environments = list(checkpoint.environments)

    def _note_environment(self) -> None:
        """Records what the last bit depends on from here on, and says what is another."""
        now = gather_environment(self.device, self.world_size, self.learner.arithmetic)
        before = dict(self.environments[-1]) if self.environments else {}
        before.pop("since_step", None)
        if now != before:
            self.environments.append({"since_step": self.step, **now})
        if self.rank == 0:
            say_changes(before, now)

    def _load_latest(self, max_step: int) -> Checkpoint | None:
        has_some = self.num_saved > 0 or self.first_step > 0  # saved here, or resumed from
        return self.latest.load(max_step, must_exist=has_some)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything as it was, but which batches are skipped."""
        self.learner.restore(checkpoint)
        self.step, self.history = checkpoint.global_step, list(checkpoint.history)
        self.meter.restart()
        if self.rank == 0:  # rows after the checkpoint are no more
            self.patience.until_done(
                lambda: self.store.show_metrics(self.history), "The metrics are not written"
            )

    def _rewind(self, number: int, is_learned: bool) -> None:
        """Back to the last checkpoint, to go on without this batch and with other noise.

        Args:
            number: of the batch.
            is_learned: whether loss and gradient were finite, and the weights then were not.
        """
        self.num_rewinds += 1
        loss = self.meter.last_loss
        if loss is None and self.history:  # this process has done no step yet
            loss = self.history[-1]["loss"]
        if is_learned:
            what, where = "The weights were", "after a finite loss"
        else:
            what, where = "The loss or its gradient was", self._culprits()
        fault = (
            f"{what} not finite at step {self.step + 1:,} ({where}, last finite loss "
            f"{'none' if loss is None else f'{loss:.4g}'})"
        )
        if self.num_rewinds > self.config.max_rewinds:
            is_half = self.learner.dtype == torch.float16
            or_exact = ', set train.precision = "fp32"' if is_half else ""
            raise TrainingError(
                f"{fault}, after {self.num_rewinds - 1} rewinds. Lower train.learning_rate"
                f"{or_exact}, or raise train.max_rewinds, and run the same command again."
            )
        self.skipped.append(number)
        self.writer.wait()
        # Not beyond this step: one that could not be read before knows of other skipped batches.
        if (checkpoint := self._load_latest(self.step) or self.begun) is None:
            raise StorageError(
                f"{fault}, and no checkpoint below {self.store.directory} can be read to go back "
                "to. See what damaged them, delete them and run the same command again."
            )
        self._restore(checkpoint)
        *before, now = self.environments
        before = [known for known in before if known["since_step"] < self.step]
        since = min(now["since_step"], self.step)
        self.environments = [*before, {**now, "since_step": since}]
        if self.rank == 0:
            logger.warning(
                "%s: training went back to step %s and skips that batch.", fault, f"{self.step:,}"
            )

    def _culprits(self) -> str:
        """The ranks whose own loss was not finite."""
        is_finite = self.meter.is_finite()
        flags = [is_finite]
        if self.world_size > 1:
            flags = [True] * self.world_size
            dist.all_gather_object(flags, is_finite)
        ranks = [str(rank) for rank, is_fine in enumerate(flags) if not is_fine]
        return f"rank {', '.join(ranks)}" if ranks else "in the gradient only"

    def _warm_up(self) -> None:
        """With the batch that comes first, which the reader has at hand."""
        if self.learner.needs_warm_up:
            with closing(self._iter_batches()) as batches:
                self.learner.warm_up(next(batches)[1])

    def _dropout_seed(self, number: int) -> int:
        return keyed_seed("dropout", self.config.seed, number, self.num_rewinds, self.rank)

    def _iter_batches(self) -> Generator[tuple[int, Batch], None, None]:
        """The batches from this step on, with their numbers; made ahead where a GPU computes."""
        return iter_batches(
            self.batches,
            self.step,
            skipped=self.skipped,
            num_rewinds=self.num_rewinds,
            for_gpu=self.device.type == "cuda",
        )

    def _report(self) -> bool:
        """What is due after this step: a row of metrics, validation, samples, a checkpoint.

        Returns:
            Whether it could be; False if there should be a checkpoint and the weights are not
            finite on some rank, which no training could go back to.
        """
        config, done = self.config, self.step
        is_last = done == config.num_steps
        closes_row = done % config.log_every == 0 or is_last
        self.watch.mark("metrics")
        is_wanted = self._ask_whether_to_save()
        saves = done % config.checkpoint_every == 0 or is_last or is_wanted
        if saves and not self._is_finite():
            return False
        self.watch.mark("metrics")
        if self.rank == 0 and _is_due(config.sample_every, done):
            self.hooks.on_samples(done, self.learner.ema.model)
        if self.rank == 0 and _is_due(config.fid_every, done):
            self.hooks.on_fid(done, self.learner.ema.model)
        if _is_due(config.fid_every, done):
            self.is_ended = self.is_ended or not self.hooks.goes_on(done)
        self.watch.mark("callbacks")
        validates = _is_due(config.validate_every, done) and self.validation is not None
        # A checkpoint closes a row, so that a resumed history goes on alike.
        if not (closes_row or validates or saves):
            return True
        row = self._row()
        if validates:
            assert self.validation is not None
            row["validation_loss"] = validation_loss(
                self.learner.ema.model,
                self.diffusion,
                self.validation,
                seed=config.seed,
                dtype=self.learner.dtype,
                rank=self.rank,
                world_size=self.world_size,
            )
        self.watch.mark("metrics")
        if saves:
            self._save()
        if self.rank == 0:
            self.hooks.on_row(row, self.first_step)
            self.watch.mark("callbacks")
        return True

    def _is_finite(self) -> bool:
        """Whether all that training goes on from is, on all ranks."""
        is_finite = self.learner.is_finite()
        if self.world_size > 1:
            dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        return bool(is_finite)

    def _ask_whether_to_save(self) -> bool:
        """Whether a checkpoint is wanted at once: now and then, and once is enough.

        Notes it where the loop is to end with that.
        """
        if self.step % self.ask_every:
            return False
        if self._is_told_to_end():
            self.is_ended = True
            return True
        was_asked, self.is_asked_to_save = self.is_asked_to_save, self.hooks.wants_checkpoint()
        return self.is_asked_to_save and not was_asked

    def _is_told_to_end(self) -> bool:
        """Whether some rank is, of which the others need not know."""
        if self.hooks.is_told_to_end is None:
            return False
        is_told = torch.tensor(int(self.hooks.is_told_to_end()), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(is_told, dist.ReduceOp.MAX)
            self.watch.mark("sync")
        return bool(is_told)

    def _save(self) -> None:
        if self.num_saved:  # the one before is whole by now, or an error
            self.begun = None
        self.num_saved += 1
        if self.rank == 0:
            self.writer.write(self._state())
            self.watch.mark("checkpoint")

    def _row(self) -> Row:
        """The metrics since the last row; ranks add up their losses."""
        measured = self.meter.take(self.world_size, self.watch.wall_s)
        self.watch.mark("sync" if self.world_size > 1 else "metrics")
        wall, seconds = self.watch.take()
        num_images = measured.pop("num_samples")
        self.ask_every = max(1, round(ASK_EVERY_S * measured.pop("steps_per_s")))
        row: Row = {
            "global_step": self.step,
            "images_seen": self.step * self.config.global_batch_size,
            **measured,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "num_rewinds": self.num_rewinds,
            "images_per_s": num_images / wall,
            "wall_s": wall,
            "seconds": seconds,
        }
        self.history.append(row)
        return row

    def _state(self) -> Checkpoint:
        """All that the next step depends on, not copied."""
        return Checkpoint(
            global_step=self.step,
            **self.learner.state(),
            history=self.history,
            skipped=tuple(self.skipped),
            num_rewinds=self.num_rewinds,
            environments=self.environments,
        )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
