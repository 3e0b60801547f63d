"""The ranks of a trial of more than one worker, and what they tell one another."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import ClusterError, EvaluationError, StorageError
from pipeline.loop import Hooks
from pipeline.settings import Config
from pipeline.storage import LocalStorage
from pipeline.tune import workers
from pipeline.tune.records import Rung, TrialStore

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


def test_a_storage_that_fails_once_ends_no_trial(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path))
    rung = Rung(RUNG, 64, 1.0, 2.0, 3.0)
    failures = [StorageError("Away. Wait.")]
    verdicts: list[bool] = []

    def rungs(store: TrialStore) -> list[Rung]:
        if failures:
            raise failures.pop()
        return [rung]

    monkeypatch.setattr(TrialStore, "rungs", rungs)
    monkeypatch.setattr(
        workers, "fit_workers", lambda *_: verdicts.append(wait_for_verdict(storage))
    )
    told: list[Rung] = []
    config = Config.model_validate_json(settings["config"])
    workers.train_with_workers(config, storage, {}, "trial", [RUNG], [], told.append)
    assert (told, verdicts, failures) == ([rung], [True], [])


def test_workers_are_told_as_soon_as_the_storage_is_back(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for a verdict for ever."""
    storage, decide = LocalStorage(str(tmp_path)), workers._decide
    failures, found = [StorageError("Away. Wait.")] * 3, list[Any]()

    def list_no_rungs(store: TrialStore) -> list[Rung]:
        raise StorageError("Away. Wait.")

    def decide_later(*args: Any, **verdict: Any) -> None:
        if failures:
            raise failures.pop()
        decide(*args, **verdict)

    monkeypatch.setattr(TrialStore, "rungs", list_no_rungs)
    monkeypatch.setattr(workers, "_decide", decide_later)
    monkeypatch.setattr(workers, "fit_workers", lambda *_: found.append(wait_for_verdict(storage)))
    config = Config.model_validate_json(settings["config"])
    train = config.train.model_copy(update={"storage_patience_s": 2})
    config = config.model_copy(update={"train": train})
    with pytest.raises(StorageError, match="Away"):
        workers.train_with_workers(config, storage, {}, "trial", [RUNG], [], lambda rung: None)
    assert found == [False]


def wait_for_verdict(storage: LocalStorage) -> Any:
    path, deadline = f"trial/verdicts/{RUNG:09d}.json", time.monotonic() + 60
    while not storage.exists(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(storage.read(path))["goes_on"]
