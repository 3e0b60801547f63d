"""What becomes of the faults that Ray Train meets."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import ray_train
from pipeline.config import load_config
from pipeline.errors import ClusterError, StorageError, TrainingError
from pipeline.storage import LocalStorage


def fault_of_starting() -> Exception:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return ControllerError(WorkerGroupStartupTimeoutError(2))


def fault_of_a_worker() -> Exception:
    from ray.train import WorkerGroupError

    return WorkerGroupError("a worker failed", {1: RuntimeError("out of luck")})


def make_trainer(result: Callable[[], Any]) -> Any:
    class Trainer:
        def __init__(self, *given: Any, **settings: Any) -> None:
            pass

        def fit(self) -> Any:
            return result()

    return Trainer


@pytest.mark.parametrize(
    ("make_fault", "kind", "says"),
    [
        (fault_of_starting, ClusterError, "could not start its workers: The worker group startup"),
        (fault_of_a_worker, TrainingError, "failed on worker 1 .*out of luck"),
    ],
)
def test_workers_that_never_ran_are_the_clusters_fault(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch,
    make_fault: Any, kind: type[Exception], says: str,
) -> None:  # fmt: skip
    def fail() -> None:
        raise make_fault()

    monkeypatch.setattr(ray_train, "_make_trainer_class", lambda: make_trainer(fail))
    with pytest.raises(kind, match=says):
        ray_train.fit_workers(load_config(tiny_config), LocalStorage(str(tmp_path)), "t", {})


def end_for_good(*_: Any) -> None:
    """What a worker runs."""
    raise TrainingError("The loss was not finite, 3 times. Lower the rate.")


def end_by_chance(*_: Any) -> None:
    """What a worker runs."""
    raise StorageError("Cannot read. Wait.")


def test_what_a_worker_would_meet_again_is_its_result_and_not_tried_again(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train
    import ray.train.torch

    monkeypatch.setattr(
        ray.train,
        "get_context",
        lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1),
    )
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: None)
    settings = {"function": f"{__name__}:end_for_good", "watches_preemption": False}
    # Ray Train takes what is raised for a fault of the worker, and starts it again.
    failure = ray_train._train_worker(settings)
    with pytest.raises(StorageError):
        ray_train._train_worker({**settings, "function": f"{__name__}:end_by_chance"})
    trainer = make_trainer(lambda: SimpleNamespace(return_value=failure))
    monkeypatch.setattr(ray_train, "_make_trainer_class", lambda: trainer)
    with pytest.raises(TrainingError, match="not finite, 3 times") as caught:
        ray_train.fit_workers(load_config(tiny_config), LocalStorage(str(tmp_path)), "t", {})
    assert caught.value.exit_code == 5
