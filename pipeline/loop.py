"""The training loop. It knows no Ray: a rank, a process group, items, and hooks.

Ray Train (`train.py`), a single process and `torchrun` are adapters around it. A step is a
function of the config and its number: which samples, which noise, which mirrored (`batches.py`).
So a run that was killed and resumed equals one that was not, to the bit on a CPU with the same
number of ranks and threads.
"""

import logging
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from diffusion_core import EMA, Diffusion
from pipeline.batches import Batch, BatchMaker, iter_batches
from pipeline.checkpoint_writer import CheckpointWriter, copy_to_host
from pipeline.checkpoints import Checkpoint, CheckpointStore, Row
from pipeline.errors import StorageError, TrainingError
from pipeline.host import keep_freed_memory
from pipeline.loader import keyed_seed
from pipeline.meter import Meter
from pipeline.order import make_order
from pipeline.precision import autocast, choose_dtype, describe_environment
from pipeline.replica import Replica
from pipeline.settings import TrainConfig
from pipeline.shards import Items
from pipeline.stopwatch import Stopwatch
from pipeline.validation import loss_of, validation_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What the loop tells, and asks.

    Args:
        on_row: on rank 0, a row of metrics and the step that this process began with.
        on_samples: on rank 0 every `sample_every` steps, the step and the EMA network.
        on_fid: on rank 0 every `fid_every` steps, the step and the EMA network.
        wants_checkpoint: on every rank equally often, before each row: whether to save at once.
    """

    on_row: Callable[[Row, int], None] = lambda row, first_step: None
    on_samples: Callable[[int, nn.Module], None] = lambda step, model: None
    on_fid: Callable[[int, nn.Module], None] = lambda step, model: None
    wants_checkpoint: Callable[[], bool] = lambda: False


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
        The rows of metrics, one for `config.log_every` steps.

    Raises:
        TrainingError: the loss was not finite, more often than `config.max_rewinds`.
        StorageError: a checkpoint cannot be written or read.
    """
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
        self.dtype = choose_dtype(config, self.device)
        self.environment = describe_environment(self.device, self.world_size)
        self.diffusion = diffusion.to(self.device)
        self.watch = Stopwatch()
        self.model = model.to(self.device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.replica = Replica(self.model, self.world_size, self.watch)
        self.meter = Meter(diffusion.num_train_timesteps, self.device)
        self.writer = CheckpointWriter(store, config.storage_patience_s)
        self.step, self.num_rewinds = 0, 0
        self.skipped: list[int] = []
        self.history: list[Row] = []

    def run(self) -> list[Row]:
        config = self.config
        self._resume()
        self.first_step = self.step
        begun = copy_to_host(self._state())
        self._warm_up()
        self.model.train()
        self.watch.take()
        batches = self._iter_batches()
        while self.step < config.num_steps:
            number, batch = next(batches)
            self.watch.mark("data")
            torch.manual_seed(self._dropout_seed(number))
            if not self._optimise(batch):
                self._rewind(number, begun)
                batches.close()
                batches = self._iter_batches()
                continue
            self.step += 1
            self.watch.mark("compute")
            self._report()
        self.writer.wait()
        return self.history

    def _resume(self) -> None:
        """From the latest checkpoint, if there is one."""
        checkpoint = self._load_latest()
        if checkpoint is None:
            return
        self._restore(checkpoint)
        self.skipped, self.num_rewinds = list(checkpoint.skipped), checkpoint.num_rewinds
        for name, before in checkpoint.environment.items():
            now = self.environment.get(name)
            if self.rank == 0 and now != before:
                logger.warning(
                    "Training continues with %s = %s, and began with %s: the last bits may differ.",
                    name,
                    now,
                    before,
                )

    def _load_latest(self) -> Checkpoint | None:
        """The latest checkpoint on every rank; rank 0 says which, so that all agree."""
        checkpoint = None
        if self.rank == 0:
            checkpoint = self.store.load_latest(self.config.num_steps)
        if self.world_size == 1:
            return checkpoint
        chosen = [checkpoint.global_step if checkpoint else -1]
        dist.broadcast_object_list(chosen, src=0)
        if self.rank != 0 and chosen[0] >= 0:
            checkpoint = self.store.load(chosen[0])
            if checkpoint is None:
                raise StorageError(
                    f"Rank {self.rank} cannot read the checkpoint at step {chosen[0]} that rank 0 "
                    "read. Set storage.root to a place that every node of the cluster shares."
                )
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything as it was, but which batches are skipped."""
        self.model.load_state_dict(checkpoint.model)
        self.ema.load(checkpoint.ema, checkpoint.global_step)
        self.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        self.scaler.load_state_dict(checkpoint.optimizer["scaler"])
        self.step, self.history = checkpoint.global_step, list(checkpoint.history)
        self.meter = Meter(self.diffusion.num_train_timesteps, self.device)
        if self.rank == 0:
            self.store.show_metrics(self.history)  # rows after the checkpoint are no more

    def _rewind(self, number: int, begun: Checkpoint) -> None:
        """Back to the last checkpoint, to go on without this batch and with other noise."""
        self.num_rewinds += 1
        last = f"{self.history[-1]['loss']:.4g}" if self.history else "none"
        fault = (
            f"The loss or its gradient was not finite at step {self.step + 1:,} "
            f"({self._culprits()}, last finite loss {last})"
        )
        if self.num_rewinds > self.config.max_rewinds:
            raise TrainingError(
                f"{fault}, after {self.num_rewinds - 1} rewinds. Lower train.learning_rate, or "
                "raise train.max_rewinds, and run the same command again."
            )
        self.skipped.append(number)
        self.writer.wait()
        self._restore(self._load_latest() or begun)
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
        """A step that changes nothing, where the first one would be unlike all others.

        DDP lays the gradients out anew after its first backward pass, by the order in which they
        came; with three ranks and more the layout changes in what order they are summed. So every
        process leaves that pass behind before it trains, also one that resumes.
        """
        if self.config.compile:
            self.replica.compile()
        if self.world_size == 1 and not self.config.compile:
            return
        if self.step == self.config.num_steps:
            return
        batches = self._iter_batches()
        _, batch = next(batches)
        batches.close()
        batch = replace(batch, self_condition=False).to(self.device)

        def run() -> None:
            with autocast(self.dtype, self.device):
                losses = loss_of(batch, self.replica.module, self.diffusion)
            self.replica.backward(losses.sum())
            self.optimizer.zero_grad(set_to_none=True)

        try:
            run()
        except Exception as error:
            if not self.config.compile:
                raise
            self.replica.give_up_compiling(error)
            run()

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

    def _optimise(self, batch: Batch) -> bool:
        """One optimiser step; False, and nothing is changed, if loss or gradient is not finite."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        parts = batch.split(config.accumulation_steps)
        for k, part in enumerate(parts):
            part = part.to(self.device)
            with self.replica.synchronised(k == len(parts) - 1):
                with autocast(self.dtype, self.device):
                    losses = loss_of(part, self.replica.module, self.diffusion)
                # Ranks' gradients are averaged: this makes it the mean over the global batch,
                # however unequal their shares.
                loss = losses.sum() * (self.world_size / config.global_batch_size)
                self.replica.backward(self.scaler.scale(loss))
            self.meter.add(losses, part.timesteps)
            is_finite &= torch.isfinite(losses.detach()).all()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        # What is not finite on one rank is so in the sum of gradients, which all ranks see. With
        # fp16 it may be the scale that was too large, and the loss decides.
        if self.scaler.is_enabled():
            if self.world_size > 1:
                dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        else:
            is_finite &= torch.isfinite(grad_norm)
        if not bool(is_finite):
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        self.meter.add_grad_norm(grad_norm)
        return True

    def _report(self) -> None:
        """What is due after this step: a row of metrics, validation, samples, a checkpoint."""
        config, done = self.config, self.step
        is_last = done == config.num_steps
        closes_row = done % config.log_every == 0 or is_last
        self.watch.mark("metrics")
        wants_checkpoint = closes_row and self.hooks.wants_checkpoint()
        if self.rank == 0 and _is_due(config.sample_every, done):
            self.hooks.on_samples(done, self.ema.model)
        if self.rank == 0 and _is_due(config.fid_every, done):
            self.hooks.on_fid(done, self.ema.model)
        self.watch.mark("callbacks")
        validates = _is_due(config.validate_every, done) and self.validation is not None
        saves = done % config.checkpoint_every == 0 or is_last or wants_checkpoint
        # A checkpoint closes a row, so that a resumed history goes on alike.
        if not (closes_row or validates or saves):
            return
        row = self._row()
        if validates:
            assert self.validation is not None
            row["validation_loss"] = validation_loss(
                self.ema.model,
                self.diffusion,
                self.validation,
                seed=config.seed,
                dtype=self.dtype,
                rank=self.rank,
                world_size=self.world_size,
            )
        self.watch.mark("metrics")
        if saves and self.rank == 0:
            self.writer.write(self._state())
            self.watch.mark("checkpoint")
        if self.rank == 0:
            self.hooks.on_row(row, self.first_step)
            self.watch.mark("callbacks")

    def _row(self) -> Row:
        """The metrics since the last row; ranks add up their losses."""
        measured = self.meter.take(self.world_size)
        self.watch.mark("sync" if self.world_size > 1 else "metrics")
        wall, seconds = self.watch.take()
        num_images = measured.pop("num_samples")
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
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
            history=self.history,
            skipped=tuple(self.skipped),
            num_rewinds=self.num_rewinds,
            environment=self.environment,
        )


def learning_rate(config: TrainConfig, step: int) -> float:
    """That of an optimiser step, counted from 0: linear warm-up, then constant or cosine to 0."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.learning_rate_decay == "constant":
        return config.learning_rate * warm
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
