"""The step `train`: the loop of `loop.py` under Ray Train, or under `torchrun`.

Ray Train starts and watches the workers and replaces dead ones. It is given no checkpoint and
no score: the project's own store is the truth, and a new worker group continues from it.
Progress reaches the driver, and `status`, through `progress.json` in the storage root.
"""

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch

from diffusion_core import UNet
from pipeline import trace
from pipeline.checkpoints import CheckpointStore, Row, to_lines, to_safetensors
from pipeline.dataset import check_cache_fits, class_counts, open_split, read_dataset
from pipeline.errors import ConfigError, DataError, StorageError, TrainingError
from pipeline.fid_validation import Scorer, scores_beside
from pipeline.fid_weights import WeightsHandover
from pipeline.host import torch_threads
from pipeline.loop import Hooks, train_loop
from pipeline.models import make_diffusion, make_unet
from pipeline.patience import Patience
from pipeline.ray_train import fit_workers
from pipeline.settings import NOISE_GROUP, Config, TrainConfig
from pipeline.steps import START_TRAINING
from pipeline.storage import Storage, open_storage
from pipeline.torchrun import (
    World,
    announce,
    await_settings,
    check_gpus,
    open_store,
    sigterm_awaits_checkpoint,
    torchrun_world,
    training_is_told,
)
from pipeline.training_progress import read_training_progress, tell_progress
from pipeline.training_views import TrainingViews
from pipeline.workflow import StepContext, read_artifact, read_manifest


def train(context: StepContext) -> dict[str, Any]:
    """Trains to `train.num_steps` and publishes the EMA weights and the loss history.

    Raises:
        TrainingError: workers failed more often than `train.max_failures`.
    """
    settings = {
        "config": context.config.model_dump_json(),
        "storage": context.storage.uri,
        "directory": context.series_directory,
        "data": json.dumps(context.inputs["preprocess"]),
        "start": _start_of(context),
        "started": time.time(),
        "watches_preemption": context.config.cluster.address is not None,
        "trace": os.environ.get(trace.VARIABLE),
    }
    world = torchrun_world()
    _check_caches(context, world)
    with scores_beside(context) as scorer, tell_progress(context, scorer):
        settings["fid_directory"] = scorer and scorer.directory
        if world is None:
            fit_workers(context.config, context.storage, context.series_directory, settings)
        else:
            announce(settings)
            _fit_under_torchrun(settings, world)
    patience = Patience(context.config.train.storage_patience_s)
    return patience.until_done(
        lambda: _write_result(context, scorer), "The result of training is not written"
    )


def _write_result(context: StepContext, scorer: Scorer | None) -> dict[str, Any]:
    """Publishes what the last checkpoint holds; may be called again. The step's metrics."""
    num_steps = context.config.train.num_steps
    checkpoint = CheckpointStore(context.storage, context.series_directory).load(num_steps)
    if checkpoint is None:
        raise TrainingError(
            f"Training ended without a readable checkpoint at step {num_steps}. "
            "Run the same command again; it continues from the one before."
        )
    num_classes = _num_classes(context.config, context.storage, context.inputs["preprocess"])
    context.write_artifact("ema.safetensors", to_safetensors(checkpoint.ema))
    context.write_artifact("metrics.jsonl", to_lines(checkpoint.history))
    if scorer is not None and (scores := scorer.rows()):
        context.write_artifact("fid.jsonl", to_lines(scores))
    last = read_training_progress(context.storage, context.series_directory) or {}
    return {
        "num_steps": num_steps,
        "images_seen": checkpoint.history[-1]["images_seen"],
        "loss": checkpoint.history[-1]["loss"],
        "images_per_s": last.get("images_per_s"),
        "resumed_from": last.get("resumed_from", num_steps),
        "seconds_to_first_step": last.get("seconds_to_first_step"),
        "num_workers": checkpoint.environments[-1]["world_size"],
        "environments": list(checkpoint.environments),
        "num_classes": num_classes,
        "num_parameters": sum(w.numel() for w in checkpoint.ema.values()),
    }


def train_in_process(
    config: Config,
    storage: Storage,
    directory: str,
    data: dict[str, Any],
    *,
    start: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    hooks: Hooks | None = None,
) -> list[Row]:
    """Runs the loop here, alone or as one rank of a process group that is already up.

    Args:
        config: the whole config.
        storage: the root.
        directory: of the checkpoints, below the root.
        data: the manifest of the step `preprocess`.
        start: the manifest of the training whose EMA weights this one begins with; none: random.
        rank: of this process.
        world_size: number of processes.
        device: to train on; the CPU when not given.
        hooks: told and asked on the way.

    Returns:
        The rows of metrics.

    Raises:
        RaydiffusionError: as `train_loop`, or the data or the `start` cannot be used.
    """
    train, window = config.train, config.data.shuffle_window
    _await_storage(storage, data, train.storage_patience_s)
    num_classes = _num_classes(config, storage, data)
    _check_cache(config, storage, data, min(_ranks_on_node(), world_size), world_size)
    how: dict[str, Any] = {
        "cache_bytes": config.data.cache_bytes,
        "patience_s": train.storage_patience_s,
    }
    items = open_split(storage, data, "train", whole=window is None, **how)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(items))
        validation = None
        if train.validate_every:
            validation = open_split(storage, data, "validation", whole=False, **how)
            stack.enter_context(contextlib.closing(validation))
            if not len(validation):
                raise DataError(
                    "train.validate_every needs a validation split, and it has no items. Raise "
                    "data.validation_fraction, or leave out train.validate_every."
                )
        stack.enter_context(torch_threads(train.cpus_per_worker))
        return train_loop(
            train,
            _begin(config, storage, num_classes, start),
            make_diffusion(config, num_classes),
            items,
            CheckpointStore(storage, directory, train.keep_every),
            validation=validation,
            shuffle_window=window,
            rank=rank,
            world_size=world_size,
            device=device,
            hooks=hooks,
        )


def _begin(
    config: Config, storage: Storage, num_classes: int | None, start: Mapping[str, Any] | None
) -> UNet:
    """The network as training begins with it, where there is no checkpoint."""
    model = make_unet(config, config.train.seed, num_classes)
    if start is not None:
        weights = safetensors.torch.load(read_artifact(storage, start, "ema.safetensors"))
        own = model.state_dict()
        other = [n for n in {**own, **weights} if _shape_of(own, n) != _shape_of(weights, n)]
        if other:
            raise ConfigError(
                f"The training steps/train/{start['key']} has another network than the config: "
                f"{other[0]} is {_shape_of(weights, other[0])} there and "
                f'{_shape_of(own, other[0])} here. Set retrain.start = "scratch".'
            )
        model.load_state_dict(weights)
    return model


def _shape_of(weights: Mapping[str, Any], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None


def _start_of(context: StepContext) -> str:
    """The manifest of the training that this one begins with, or null: JSON, for the workers."""
    key = context.planned.step.settings.get(START_TRAINING)
    if key is None:
        return "null"
    manifest = read_manifest(context.storage, "train", key)
    if manifest is None:
        raise StorageError(
            f"{context.storage.uri}/steps/train/{key} is gone, whose weights training begins with. "
            'Bring it back from a copy, or set retrain.start = "scratch".'
        )
    return json.dumps(manifest)


def _num_classes(config: Config, storage: Storage, data: Mapping[str, Any]) -> int | None:
    """How many the network is told of; None: it is not told."""
    if not config.model.class_conditional:
        return None
    return len(class_counts(read_dataset(storage, data), "train"))


def _await_storage(storage: Storage, data: Mapping[str, Any], patience_s: float) -> None:
    """Waits for a storage that is away, as the data set tells that was there a moment ago."""
    path = f"steps/{data['step']}/{data['key']}/{data['artifacts']['dataset.json']['file']}"

    def look() -> None:
        if not storage.exists(path):
            raise StorageError(
                f"{storage.uri}/{path} is gone. See that the storage root is there, on every node."
            )

    Patience(patience_s).until_done(look, "The data set is not there")


@contextlib.contextmanager
def process_group(config: TrainConfig, backend: str = "gloo", **where: Any) -> Iterator[None]:
    """A process group while the block runs.

    Args:
        config: the training settings.
        backend: gloo, or nccl on GPUs.
        **where: `rank`, `world_size`, and the `store` or the `init_method` by which ranks meet.
    """
    import torch.distributed as dist

    timeout = timedelta(seconds=config.group_timeout_s)
    dist.init_process_group(backend, timeout=timeout, **where)
    has_failed = True
    try:
        yield
        dist.barrier()  # rank 0 writes the last checkpoint while the others are done
        has_failed = False
    finally:
        # The replica is part of a cycle that holds the group's threads: were they still running
        # when the interpreter ends, the process would abort.
        gc.collect()
        # NCCL would wait for the others, who wait for this rank: its end tells them.
        if backend != "nccl" or not has_failed:
            dist.destroy_process_group()


def train_under_torchrun(world: World) -> None:
    """What the ranks but 0 of `torchrun` do: train when rank 0 does, or leave.

    Raises:
        RaydiffusionError: as on rank 0, which tells it.
        SystemExit: some rank was told to end, and all have made a checkpoint.
    """
    if (settings := await_settings()) is not None:
        with sigterm_awaits_checkpoint():
            _fit_under_torchrun(settings, world)


def _fit_under_torchrun(settings: dict[str, Any], world: World) -> None:
    """One rank of the process group that torchrun's environment describes."""
    config = Config.model_validate_json(settings["config"]).train
    device = torch.device("cuda", world.local_rank) if config.use_gpu else torch.device("cpu")
    if config.use_gpu:
        check_gpus(world)  # rank 0 has done so before, on its machine
        torch.cuda.set_device(device)
    backend = "nccl" if config.use_gpu else "gloo"
    ranks: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size}
    if config.use_gpu:
        ranks["device_id"] = device  # which NCCL would else have to guess
    store = open_store(timedelta(seconds=config.group_timeout_s))
    with training_is_told() as is_told:
        with process_group(config, backend, store=store, **ranks):
            told = {"wants_checkpoint": lambda: False, "is_told_to_end": is_told}
            rows = _train_rank(settings, world.rank, world.world_size, device, **told)
        if not rows or rows[-1]["global_step"] < config.num_steps:
            raise SystemExit  # as SIGTERM does where there is Ray


def _train_rank(
    settings: dict[str, Any],
    rank: int,
    world_size: int,
    device: Any,
    wants_checkpoint: Callable[[], bool],
    is_told_to_end: Callable[[], bool] | None = None,
) -> list[Row]:
    config = Config.model_validate_json(settings["config"])
    storage = open_storage(settings["storage"])
    views = TrainingViews(config, storage, settings["directory"], settings["started"])
    on_row = views.on_row
    if path := settings["trace"]:
        on_row = trace.trace_rank(path, on_row, rank=rank, world_size=world_size)
    hooks = Hooks(
        on_row,
        views.on_samples,
        wants_checkpoint=wants_checkpoint,
        is_told_to_end=is_told_to_end,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(views))
        if rank == 0 and (directory := settings["fid_directory"]) is not None:
            handover = stack.enter_context(contextlib.closing(WeightsHandover(storage, directory)))
            hooks = replace(hooks, on_fid=handover.hand_over)
        return train_in_process(
            config,
            storage,
            settings["directory"],
            json.loads(settings["data"]),
            start=json.loads(settings["start"]),
            rank=rank,
            world_size=world_size,
            device=device,
            hooks=hooks,
        )


def _check_caches(context: StepContext, world: World | None) -> None:
    """Refuses what cannot be cached; says where it could not be by fewer workers than may train."""
    config, train = context.config, context.config.train
    data = dict(context.inputs["preprocess"])
    if world is not None:
        on_node = min(_ranks_on_node(), world.world_size)
        _check_cache(config, context.storage, data, on_node, world.world_size)
        return
    # At least one rank is on a node; where there are more, they look again themselves.
    _check_cache(config, context.storage, data, 1, train.max_workers)
    if train.min_workers == train.max_workers:
        return
    try:
        _check_cache(config, context.storage, data, 1, train.min_workers)
    except DataError as error:
        fewest = f"{train.min_workers} of {train.max_workers} workers"
        context.note(f"training would end if {fewest} were left: {error}")


def _ranks_on_node() -> int:
    """As torchrun and Ray Train set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _check_cache(
    config: Config, storage: Storage, data: dict[str, Any], on_node: int, world_size: int
) -> None:
    """Refuses what the shard cache of a node with so many of the ranks cannot hold."""
    batch = config.train.global_batch_size
    num_groups = most_groups(batch // NOISE_GROUP, on_node, world_size)
    check_cache_fits(storage, data, config.data, global_batch_size=batch, num_groups=num_groups)


def most_groups(num_groups: int, on_node: int, world_size: int) -> int:
    """How many of a batch's groups a node with some of the ranks has at most.

    Args:
        num_groups: of the batch.
        on_node: ranks of the node.
        world_size: ranks in all, among which shares are as equal as can be.
    """
    return min(num_groups, on_node * -(-num_groups // world_size))
