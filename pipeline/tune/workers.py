"""A trial of more than one worker: Ray Train runs them, and the trial's own process decides.

Rank 0 scores a rung and keeps it; the trial's process sees the score, tells Ray Tune, and leaves
its verdict beside it; every rank reads that before it goes on. Where a score is not finite, the
error is rank 0's own verdict, and every rank ends with it. Where nobody decides any more, as the
driver is gone, Ray ends the workers with it.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from pipeline.errors import ClusterError, EvaluationError, StorageError
from pipeline.loop import Hooks
from pipeline.patience import Patience
from pipeline.ray_train import fit_workers
from pipeline.settings import Config
from pipeline.storage import Storage, open_storage
from pipeline.train import train_in_process
from pipeline.tune.records import Rung, TrialStore, read_json
from pipeline.tune.scoring import Inputs, open_score

LOOK_EVERY_S = 0.2
RANK_FUNCTION = "pipeline.tune.workers:train_rank"


def train_with_workers(
    config: Config,
    storage: Storage,
    inputs: Inputs,
    directory: str,
    rungs: Sequence[int],
    known: Collection[int],
    on_score: Callable[[Rung], None],
) -> None:
    """Trains and scores with Ray Train's workers, from where an earlier attempt was killed.

    Args:
        config: of the trial.
        storage: the root.
        inputs: the manifests of `preprocess`, `features` and `reference`.
        directory: of the trial, below the root.
        rungs: the steps at which it is scored.
        known: those whose score was there before.
        on_score: told each score that was not there before; what it raises ends the trial.
    """
    store = TrialStore(storage, directory)
    told = set(known)
    storage.delete(f"{directory}/verdicts")  # of an attempt that was killed
    for step in told:
        _decide(storage, directory, step, goes_on=True)
    settings = {
        "function": RANK_FUNCTION,
        "config": config.model_dump_json(),
        "storage": storage.uri,
        "directory": directory,
        "inputs": json.dumps({name: dict(manifest) for name, manifest in inputs.items()}),
        "rungs": list(rungs),
        "watches_preemption": False,
    }
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            fit_workers(config, storage, directory, settings)
        except BaseException as error:  # raised where the trial is
            failures.append(error)

    patience = Patience(config.train.storage_patience_s)

    def decide(step: int, *, goes_on: bool) -> None:
        patience.until_done(
            lambda: _decide(storage, directory, step, goes_on=goes_on), "A verdict is not written"
        )

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK_EVERY_S)
            for rung in patience.until_done(store.rungs, "The trial's scores are not read"):
                if rung.step in rungs and rung.step not in told:
                    told.add(rung.step)
                    on_score(rung)
                    decide(rung.step, goes_on=True)
    except BaseException:
        ends, is_told = time.monotonic() + config.train.storage_patience_s, False
        while thread.is_alive():
            if not is_told:
                with contextlib.suppress(StorageError):
                    for step in rungs:  # also one that is being scored just now
                        _decide(storage, directory, step, goes_on=False)
                    is_told = True
            if not is_told and time.monotonic() > ends:
                break  # they end with this process
            thread.join(LOOK_EVERY_S)
        raise
    finally:
        with contextlib.suppress(StorageError):  # the next attempt deletes them first
            storage.delete(f"{directory}/verdicts")
    if failures:
        raise failures[0]


def train_rank(
    settings: dict[str, Any],
    rank: int,
    world_size: int,
    device: torch.device,
    wants_checkpoint: Callable[[], bool],
) -> None:
    """What each worker of a trial runs."""
    storage, directory = open_storage(settings["storage"]), settings["directory"]
    config, rungs = Config.model_validate_json(settings["config"]), settings["rungs"]
    inputs = json.loads(settings["inputs"])

    patience = Patience(config.train.storage_patience_s)

    def goes_on(step: int) -> bool:
        path = f"{directory}/verdicts/{step:09d}.json"
        while step in rungs:
            verdict = patience.until_done(lambda: read_json(storage, path), "A verdict is not read")
            if verdict is not None:
                if (error := verdict.get("error")) is not None:
                    raise EvaluationError(error)
                return verdict["goes_on"]
            time.sleep(LOOK_EVERY_S)
        return True

    with contextlib.ExitStack() as stack:
        hooks = Hooks(goes_on=goes_on, wants_checkpoint=wants_checkpoint)
        if rank == 0:
            try:
                score = stack.enter_context(open_score(config, storage, inputs))
            except EvaluationError as error:  # of this node: the others train, and see no verdict
                raise ClusterError(str(error)) from error
            store = TrialStore(storage, directory)
            scorer = make_scorer(config, store, score, rungs)

            def score_rung(step: int, model: torch.nn.Module) -> None:
                try:
                    scorer(step, model)
                except EvaluationError as error:  # the others wait for a verdict
                    _decide(storage, directory, step, goes_on=False, error=str(error))
                    raise

            hooks = Hooks(
                on_fid=score_rung,
                goes_on=goes_on,
                wants_checkpoint=wants_checkpoint,
            )
        train = config.train.model_copy(update={"fid_every": math.gcd(*rungs)})
        train_in_process(
            config.model_copy(update={"train": train}),
            storage,
            directory,
            inputs["preprocess"],
            rank=rank,
            world_size=world_size,
            device=device,
            hooks=hooks,
        )


def make_scorer(
    config: Config, store: TrialStore, score: Any, rungs: Sequence[int]
) -> Callable[[int, Any], Rung | None]:
    """The hook that scores the EMA network at the rungs, and keeps each score once.

    Args:
        config: of the trial.
        store: of the trial.
        score: of a network; see `open_score`.
        rungs: the steps at which it is scored.

    Returns:
        A function of step and network: the score, new or kept, or None between rungs.
    """
    known = {rung.step: rung for rung in store.rungs()}
    started = time.monotonic()

    def score_when_due(step: int, model: Any) -> Rung | None:
        nonlocal started
        if step not in rungs:
            return None
        if step not in known:
            begun = time.monotonic()
            with torch.random.fork_rng(devices=[]):
                value, samples = score(model)
            now = time.monotonic()
            images = step * config.train.global_batch_size
            known[step] = Rung(step, images, value, begun - started, now - begun)
            store.add_rung(known[step], samples)
        started = time.monotonic()
        return known[step]

    return score_when_due


def _decide(storage: Storage, directory: str, step: int, **verdict: Any) -> None:
    path = f"{directory}/verdicts/{step:09d}.json"
    storage.replace(path, json.dumps(verdict).encode())
