"""The step `train`: the loop of `loop.py` under Ray Train, or under `torchrun`.

Ray Train starts and watches the workers and replaces dead ones. It is given no checkpoint and
no score: the project's own store is the truth, and a new worker group continues from it.
Progress reaches the driver, and `status`, through `progress.json` in the storage root.
"""

import contextlib
import gc
import importlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from pipeline import trace
from pipeline.checkpoint_writer import Patience
from pipeline.checkpoints import CheckpointStore, Row, to_lines, to_safetensors
from pipeline.dataset import check_cache_fits, class_counts, open_split, read_dataset
from pipeline.errors import (
    ERRORS,
    DataError,
    EvaluationError,
    RaydiffusionError,
    StorageError,
    TrainingError,
)
from pipeline.fid_validation import Scorer, scores_beside
from pipeline.fid_weights import WeightsHandover
from pipeline.host import torch_threads
from pipeline.loop import Hooks, train_loop
from pipeline.models import make_diffusion, make_unet
from pipeline.settings import NOISE_GROUP, Config
from pipeline.storage import ObjectStorage, Storage, open_storage
from pipeline.torchrun import World, announce, await_settings, torchrun_world
from pipeline.training_views import PROGRESS_EVERY_S, TrainingViews
from pipeline.workflow import StepContext

GROUP_TIMEOUT = timedelta(minutes=10)  # of an exchange between ranks: one that is gone is noticed


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
        "started": time.time(),
        "watches_preemption": context.config.cluster.address is not None,
        "trace": os.environ.get(trace.VARIABLE),
    }
    # At least one rank is on a node; where there are more, they look again themselves.
    data = dict(context.inputs["preprocess"])
    _check_cache(context.config, context.storage, data, 1, context.config.train.max_workers)
    world = torchrun_world()
    with scores_beside(context) as scorer, _tell_progress(context, scorer):
        settings["fid_directory"] = scorer and scorer.directory
        if world is None:
            fit_workers(context.config, context.storage, context.series_directory, settings)
        else:
            announce(settings)
            _fit_under_torchrun(settings, world)
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
    last = _read_progress(context.storage, context.series_directory) or {}
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
    config: Config, storage: Storage, directory: str, data: dict[str, Any], **ranks: Any
) -> list[Row]:
    """Runs the loop here, alone or as one rank of a process group that is already up.

    Args:
        config: the whole config.
        storage: the root.
        directory: of the checkpoints, below the root.
        data: the manifest of the step `preprocess`.
        **ranks: `rank`, `world_size`, `device`, `hooks` of `train_loop`.
    """
    train, window = config.train, config.data.shuffle_window
    num_classes = _num_classes(config, storage, data)
    world_size = ranks.get("world_size", 1)
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun and Ray Train set it
    _await_storage(storage, data, train.storage_patience_s)
    _check_cache(config, storage, data, min(on_node, world_size), world_size)
    cache_bytes = config.data.cache_bytes
    items = open_split(storage, data, "train", whole=window is None, cache_bytes=cache_bytes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(items))
        validation = None
        if train.validate_every:
            validation = open_split(
                storage, data, "validation", whole=False, cache_bytes=cache_bytes
            )
            stack.enter_context(contextlib.closing(validation))
            if not len(validation):
                raise DataError(
                    "train.validate_every needs a validation split, and it has no items. Raise "
                    "data.validation_fraction, or leave out train.validate_every."
                )
        stack.enter_context(torch_threads(train.cpus_per_worker))
        return train_loop(
            train,
            make_unet(config, train.seed, num_classes),
            make_diffusion(config, num_classes),
            items,
            CheckpointStore(storage, directory, train.keep_every),
            validation=validation,
            shuffle_window=window,
            **ranks,
        )


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
def process_group(backend: str = "gloo", **where: Any) -> Iterator[None]:
    """A process group while the block runs.

    Args:
        backend: gloo, or nccl on GPUs.
        **where: `init_method`, `rank` and `world_size`; without them the environment tells.
    """
    import torch.distributed as dist

    dist.init_process_group(backend, timeout=GROUP_TIMEOUT, **where)
    try:
        yield
        dist.barrier()  # rank 0 writes the last checkpoint while the others are done
    finally:
        # The replica is part of a cycle that holds the group's threads: were they still running
        # when the interpreter ends, the process would abort.
        gc.collect()
        dist.destroy_process_group()


def train_under_torchrun(world: World) -> None:
    """What the ranks but 0 of `torchrun` do: train when rank 0 does, or leave.

    Raises:
        RaydiffusionError: as on rank 0, which tells it.
    """
    if (settings := await_settings()) is not None:
        _fit_under_torchrun(settings, world)


def _fit_under_torchrun(settings: dict[str, Any], world: World) -> None:
    """One rank of the process group that torchrun's environment describes."""
    import torch

    use_gpu = Config.model_validate_json(settings["config"]).train.use_gpu
    device = torch.device("cuda", world.local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    with process_group(backend="nccl" if use_gpu else "gloo"):
        _train_rank(settings, world.rank, world.world_size, device, lambda: False)


def _train_worker(settings: dict[str, Any]) -> dict[str, str] | None:
    """What each worker of Ray Train runs; an error that it would meet again is its result."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    module, _, name = settings.get("function", "pipeline.train:_train_rank").partition(":")
    try:
        getattr(importlib.import_module(module), name)(
            settings,
            context.get_world_rank(),
            context.get_world_size(),
            ray.train.torch.get_device(),
            _is_preempted if settings["watches_preemption"] else lambda: False,
        )
    except (TrainingError, EvaluationError) as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return None


def _train_rank(
    settings: dict[str, Any],
    rank: int,
    world_size: int,
    device: Any,
    wants_checkpoint: Callable[[], bool],
) -> None:
    config = Config.model_validate_json(settings["config"])
    storage = open_storage(settings["storage"])
    views = TrainingViews(config, storage, settings["directory"], settings["started"])
    on_row = views.on_row
    if path := settings["trace"]:
        on_row = trace.trace_rank(path, on_row, rank=rank, world_size=world_size)
    hooks = Hooks(on_row, views.on_samples, wants_checkpoint=wants_checkpoint)
    with contextlib.ExitStack() as stack:
        if rank == 0 and (directory := settings["fid_directory"]) is not None:
            handover = stack.enter_context(contextlib.closing(WeightsHandover(storage, directory)))
            hooks = replace(hooks, on_fid=handover.hand_over)
        train_in_process(
            config,
            storage,
            settings["directory"],
            json.loads(settings["data"]),
            rank=rank,
            world_size=world_size,
            device=device,
            hooks=hooks,
        )


def _is_preempted() -> bool:
    """Whether a node of this training is about to be taken away; asked on every rank."""
    import ray.train

    return ray.train.get_preemption_info() is not None


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


def fit_workers(config: Config, storage: Storage, directory: str, settings: dict[str, Any]) -> None:
    """Trains with Ray Train's workers; returns when all are done.

    Args:
        config: the whole config.
        storage: the root.
        directory: of the training, below the root.
        settings: that each worker gets; `function` names what it runs, as `module:name`, where that
            is not the training of the step `train`.

    Raises:
        TrainingError: workers failed more often than `train.max_failures`.
    """
    import ray.train
    from ray.train.torch import TorchConfig

    train_config = config.train
    # Ray's own records are of no use to us, and must not be found by a later attempt.
    ray_directory = f"{directory}/ray"
    storage.delete(ray_directory)
    trainer = _make_trainer_class()(
        _train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(
            backend="nccl" if train_config.use_gpu else "gloo",
            timeout_s=int(GROUP_TIMEOUT.total_seconds()),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train_config.num_workers,
            use_gpu=train_config.use_gpu,
            resources_per_worker={"CPU": train_config.cpus_per_worker}
            | ({"GPU": 1} if train_config.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,
            failure_config=ray.train.FailureConfig(
                max_failures=train_config.max_failures, controller_failure_limit=3
            ),
            **ray_storage(storage, ray_directory),
        ),
    )
    try:
        result = trainer.fit()
        if (failure := result.return_value) is not None:
            raise ERRORS[failure["kind"]](failure["error"])
    except ray.train.TrainingFailedError as error:
        raise _explain(error) from error
    finally:
        with contextlib.suppress(RaydiffusionError):
            storage.delete(ray_directory)


def _make_trainer_class() -> Any:
    """TorchTrainer without its placement-group cleaner; see docs/decisions/0002-ray-train.md.

    The cleaner asks Ray's State API, which may not answer, and then holds up the end of every
    fit() for 12 s. It guards against a controller that outlives its driver's placement group;
    ours belongs to the driver and goes with it.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # pyright: ignore
            return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    return Trainer


def ray_storage(storage: Storage, directory: str) -> dict[str, Any]:
    """Where Ray may write its own records, as arguments of its RunConfig."""
    path = f"{storage.uri}/{directory}"
    if not isinstance(storage, ObjectStorage):
        return {"storage_path": path}
    import fsspec
    import pyarrow.fs

    filesystem, stripped = fsspec.core.url_to_fs(path)
    handler = pyarrow.fs.FSSpecHandler(filesystem)
    return {"storage_path": stripped, "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}


def _explain(error: Exception) -> RaydiffusionError:
    """The user's error inside a worker's failure if there is one, else a TrainingError."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, RaydiffusionError):
            return cause
    rank, failure = next(iter(failures.items()), (None, error))
    lines = [line for line in str(failure).strip().splitlines() if line.strip()]
    where = f"on worker {rank} " if rank is not None else ""
    return TrainingError(
        f"Training failed {where}and its retries are used up: {lines[-1] if lines else failure!r}. "
        "Checkpoints are kept; mend the cause and run the same command again."
    )


@contextlib.contextmanager
def _tell_progress(context: StepContext, scorer: Scorer | None) -> Iterator[None]:
    """Passes on what rank 0 writes, from a thread of its own, while the block runs."""
    stop = threading.Event()
    context.storage.delete(f"{context.series_directory}/progress.json")

    def watch() -> None:
        told: tuple[tuple[int, float], int] | None = None
        noted = 0
        ended = False
        while not ended:
            ended = stop.wait(PROGRESS_EVERY_S)
            document = _read_progress(context.storage, context.series_directory)
            if document is None:
                continue
            began = (document["resumed_from"], document["seconds_to_first_step"])
            now = (began, document["global_step"])
            if now == told:
                continue
            if told is None or told[0] != began:  # another group of workers, with notes of its own
                noted = 0
                note = f"first step after {document['seconds_to_first_step']:.0f} s"
                if began[0]:
                    note += f", resumed from the checkpoint at step {began[0]:,}"
                context.note(note)
                if scorer is not None:
                    scorer.begin(began[0])
            if scorer is not None:
                scorer.reach(now[1])
            for text in document["notes"][noted:]:
                context.note(text)
            noted, told = len(document["notes"]), now
            context.progress(
                document["global_step"],
                document["num_steps"],
                "steps",
                rate=document["images_per_s"],
                rate_unit="images/s",
                loss=document["loss"],
                left_s=document["seconds_left"],
            )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _read_progress(storage: Storage, directory: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(f"{directory}/progress.json"))
    except (FileNotFoundError, StorageError):
        return None
