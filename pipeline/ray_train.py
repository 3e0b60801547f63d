"""Ray Train: starts a group of workers, watches them, and replaces those that die.

It is given no checkpoint and no score; what the workers run is the project's own.
"""

import contextlib
import importlib
import uuid
from typing import Any

from pipeline.errors import (
    ERRORS,
    ClusterError,
    EvaluationError,
    RaydiffusionError,
    TrainingError,
)
from pipeline.object_storage import ObjectStorage
from pipeline.settings import Config
from pipeline.storage import Storage


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
        ClusterError: the workers could not be started, several times over.
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
            timeout_s=int(train_config.group_timeout_s),
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
    """The user's error inside a worker's failure if there is one, else what Ray Train met."""
    from ray.train import ControllerError

    if isinstance(error, ControllerError):  # no verdict on the training, which did not run
        first = (str(error.controller_failure).strip().splitlines() or [repr(error)])[0]
        return ClusterError(
            f"Ray Train could not start its workers: {first} Checkpoints are kept; see that the "
            "cluster has room for the workers and run the same command again."
        )
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


def _is_preempted() -> bool:
    """Whether a node of this training is about to be taken away; asked on every rank."""
    import ray.train

    return ray.train.get_preemption_info() is not None


class Places:
    """What workers of Ray Train hold in this job from now on, to be given back when they stop.

    Ray Tune ends a trial's process at the end of its search, and Ray keeps the placement group that
    Ray Train made there until the whole job is over: the next training would wait for it for ever.
    Groups that are there already are somebody else's. Ray's public table does not say who made a
    group.
    """

    def __init__(self) -> None:
        self._others = {group.placement_group_id for group in self._groups()}

    def free(self, *, of_the_dead: bool = False) -> None:
        """Removes the groups that actors of this job have made since.

        Args:
            of_the_dead: only those whose maker, Ray Train's controller, is dead.
        """
        import ray
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup

        for group in self._groups():
            key = group.placement_group_id
            if key not in self._others and (group.creator_actor_dead or not of_the_dead):
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(key)))

    def _groups(self) -> list[Any]:
        """Those of this job that an actor made and that are not removed."""
        import ray
        from ray._private.state import state
        from ray.core.generated import gcs_pb2

        job = ray.get_runtime_context().get_job_id()
        driver = ray.ActorID.nil().binary()  # the maker of what no actor made
        kind = vars(gcs_pb2)["PlacementGroupTableData"]
        rows = state._connect_and_get_accessor().get_placement_group_table()
        return [
            group
            for group in map(kind.FromString, rows)
            if group.creator_job_id.hex() == job
            and group.creator_actor_id != driver
            and group.state != kind.REMOVED
        ]
