"""The ranks of a trial of more than one worker, and what they tell one another."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import ClusterError, EvaluationError
from pipeline.loop import Hooks
from pipeline.storage import LocalStorage
from pipeline.tune import workers

RUNG = 4


@pytest.fixture
def settings(tiny_config: Path, tmp_path: Path) -> dict[str, Any]:
    """What each rank is given."""
    return {
        "config": load_config(tiny_config).model_dump_json(),
        "storage": LocalStorage(str(tmp_path)).uri,
        "directory": "trial",
        "inputs": json.dumps({"preprocess": {}}),
        "rungs": [RUNG],
    }


def test_a_score_that_is_not_finite_ends_every_rank(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def open_score(*_: Any) -> Iterator[Any]:
        def score(model: Any) -> tuple[float, bytes]:
            raise EvaluationError("There is no finite score. Lower the rate.")

        yield score

    def train(*_: Any, rank: int, hooks: Hooks, **__: Any) -> None:
        """As the loop calls the hooks."""
        if rank == 0:
            hooks.on_fid(RUNG, torch.nn.Identity())
        hooks.goes_on(RUNG)

    monkeypatch.setattr(workers, "open_score", open_score)
    monkeypatch.setattr(workers, "train_in_process", train)
    ended: dict[int, str] = {}

    def run(rank: int) -> None:
        with pytest.raises(EvaluationError) as caught:
            workers.train_rank(settings, rank, 2, torch.device("cpu"), lambda: False)
        ended[rank] = str(caught.value)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == dict.fromkeys((0, 1), "There is no finite score. Lower the rate.")


def test_a_node_that_cannot_score_is_no_verdict_on_the_trial(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray Train is told as a result, it takes for an end that the other ranks know of."""

    def fail(*_: Any) -> Any:
        raise EvaluationError("The extractor differs between nodes. Install the same.")

    monkeypatch.setattr(workers, "open_score", fail)
    with pytest.raises(ClusterError, match="differs between nodes"):
        workers.train_rank(settings, 0, 2, torch.device("cpu"), lambda: False)
