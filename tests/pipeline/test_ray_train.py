"""What becomes of the faults that Ray Train meets."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import ray_train
from pipeline.config import load_config
from pipeline.errors import ClusterError, TrainingError
from pipeline.storage import LocalStorage


def fault_of_starting() -> Exception:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return ControllerError(WorkerGroupStartupTimeoutError(2))


def fault_of_a_worker() -> Exception:
    from ray.train import WorkerGroupError

    return WorkerGroupError("a worker failed", {1: RuntimeError("out of luck")})


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
    class Trainer:
        def __init__(self, *given: Any, **settings: Any) -> None:
            pass

        def fit(self) -> None:
            raise make_fault()

    monkeypatch.setattr(ray_train, "_make_trainer_class", lambda: Trainer)
    with pytest.raises(kind, match=says):
        ray_train.fit_workers(load_config(tiny_config), LocalStorage(str(tmp_path)), "t", {})
