"""Ray Tune: runs trials on the cluster, as many at a time as it holds, and ends the hopeless ones.

Ray Tune schedules, searches and stops; it is given nothing to keep. Its own files go to a scratch
directory, from which only those for people are copied out, and nothing of it is unpickled: what an
experiment continues from are the project's records (`records.py`).
"""

import contextlib
import logging
import os
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.capacity import fits_on
from pipeline.cluster import Node
from pipeline.errors import (
    ERRORS,
    BusyError,
    ClusterError,
    RaydiffusionError,
    StorageError,
)
from pipeline.ray_train import Places, ray_storage
from pipeline.settings import Config
from pipeline.storage import Storage, open_storage
from pipeline.tune.records import Entry, Records, Result, Rung
from pipeline.tune.trial import grace_steps, run_trial, trial_config

logger = logging.getLogger(__name__)

SCORE, IMAGES = "score", "images_seen"  # names in Ray Tune's results
LEFT_OUT = (".pkl", "experiment_state")  # of Ray Tune's files: pickles and its own state
# Read by Ray Tune: a failed trial reports no score; nothing is printed.
RAY_ENVIRONMENT = {"TUNE_DISABLE_STRICT_METRIC_CHECKING": "1", "RAY_AIR_NEW_OUTPUT": "0"}
# For the thread of a stopped trial, beyond what storage is waited for, before its actor is used
# again: Ray Tune would end the next trial if it took longer.
END_TIMEOUT_S = 300
IDLE_TIMEOUT_S = 600  # without any trial that runs, while some are to
FREE_EVERY_S = 5  # what workers held whose trial's process was killed
OURS = (StorageError, ClusterError, BusyError)  # not of a trial: no verdict on it

Source = Callable[[], Entry | None]
OnEnd = Callable[[Entry, Result], None]


def concurrency(config: Config, nodes: Sequence[Node]) -> int:
    """How many trials fit the cluster at a time, within `tune.max_concurrent`; at least 1."""
    workers = sum(fits_on(config, node) for node in nodes) // config.train.max_workers
    return max(1, min(workers, config.tune.max_concurrent or workers))


def run_trials(
    config: Config,
    storage: Storage,
    inputs: Mapping[str, Mapping[str, Any]],
    records: Records,
    source: Source,
    on_end: OnEnd,
    *,
    count: int,
    at_a_time: int,
    rungs: Sequence[int],
    replayed: Mapping[str, Result] | None = None,
    on_rung: Callable[[Entry, Rung], None] = lambda entry, rung: None,
    trainable: Callable[..., None] | None = None,
) -> None:
    """Runs the trials that a source gives until it has no more; each is recorded when it ends.

    What is wrong with the cluster or the storage is no verdict on a trial: it ends the experiment,
    and the same command continues it. A trial that Ray Tune lost without a word has no result.

    Args:
        config: the base.
        storage: the root.
        inputs: the manifests of `preprocess`, `features` and `reference`.
        records: of the experiment.
        source: the next trial, or None; asked while others run.
        on_end: told each result, once it is recorded.
        count: of trials, at most.
        at_a_time: of trials.
        rungs: steps at which they are scored; with more than the last, ASHA stops between them.
        replayed: results of an earlier process, which ASHA compares with.
        on_rung: told each score.
        trainable: what a trial runs.

    Raises:
        ClusterError: Ray lost the work, or nothing ran for ten minutes.
        StorageError: a record could not be written.
    """
    os.environ |= RAY_ENVIRONMENT
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # every failure is in the records
    scratch = f"{records.directory.rpartition('/')[0]}/ray"
    keep_logs(storage, scratch)
    watcher = _make_watcher(records, source, on_end, on_rung, rungs[-1], at_a_time)
    if config.train.max_workers > 1:
        watcher.places = Places()
    common = {"config": config.model_dump_json(), "storage": storage.uri, "rungs": list(rungs)}
    common["inputs"] = {name: dict(manifest) for name, manifest in inputs.items()}
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(at_a_time))
    function = tune.with_parameters(trainable or _trainable, common=common)
    tuner = tune.Tuner(
        tune.with_resources(function, _bundles(config)),
        tune_config=tune.TuneConfig(
            num_samples=count,  # metric and mode are told to ASHA itself, which knows more already
            search_alg=watcher.searcher,
            scheduler=_make_scheduler(config, rungs, replayed or {}),
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.config["name"],
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            callbacks=[watcher.callback],
            **ray_storage(storage, scratch),
        ),
    )
    try:
        tuner.fit()
    except Exception as error:  # Ray Tune wraps whatever it meets
        if not watcher.errors:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            watcher.errors.append(
                ClusterError(
                    f"Ray Tune lost the search: {first}. Ended trials are kept; see that the "
                    "cluster is well and run the same command again."
                )
            )
    finally:
        with contextlib.suppress(RaydiffusionError):
            keep_logs(storage, scratch)
        if watcher.places is not None:
            with contextlib.suppress(Exception):  # a cluster that is gone holds nothing
                watcher.places.free()
    if watcher.errors:
        raise watcher.errors[0]


def keep_logs(storage: Storage, scratch: str) -> None:
    """Copies what Ray Tune wrote for people, TensorBoard's files and tables, and drops the rest."""
    above = scratch.rpartition("/")[0]
    target, names = f"{above}/logs", storage.list(f"{above}/trials")
    for run in storage.list(scratch):
        for trial in [name for name in storage.list(f"{scratch}/{run}") if name in names]:
            for name in storage.list(f"{scratch}/{run}/{trial}"):
                if not name.endswith(LEFT_OUT) and not name.startswith(LEFT_OUT):
                    content = storage.read(f"{scratch}/{run}/{trial}/{name}")
                    storage.replace(f"{target}/{trial}/{name}", content)
    storage.delete(scratch)


def _bundles(config: Config) -> Any:
    """What a trial takes: a worker's share, or next to nothing where Ray Train has the workers."""
    from ray import tune

    train = config.train
    worker: dict[str, float] = {"CPU": float(train.cpus_per_worker)} | (
        {"GPU": 1} if train.use_gpu else {}
    )
    if train.max_workers == 1:
        return tune.PlacementGroupFactory([worker])
    return tune.PlacementGroupFactory([{"memory": 1 << 20}])


def _make_scheduler(config: Config, rungs: Sequence[int], replayed: Mapping[str, Result]) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    if len(rungs) < 2:
        return FIFOScheduler()
    batch = config.train.global_batch_size

    class Scheduler(AsyncHyperBandScheduler):
        """Ends neither what has gone on from there already nor the config as it is."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(controller, trial, result)
            is_last = result.get(IMAGES, 0) >= self._max_t
            if not is_last and (result.get("has_passed") or trial.config["is_default"]):
                return self.CONTINUE
            return action

    scheduler = Scheduler(
        time_attr=IMAGES,
        metric=SCORE,
        mode="min",
        max_t=config.trial_steps * batch,
        grace_period=grace_steps(config) * batch,
        reduction_factor=config.tune.reduction_factor,
    )
    for name, result in replayed.items():  # with what is known of trials of an earlier process
        past: Any = _Past(name)
        scheduler.on_trial_add(None, past)  # pyright: ignore[reportArgumentType]
        for rung in result.rungs:  # of failed ones as well, which Ray keeps while it runs
            seen = {IMAGES: rung.images_seen, SCORE: rung.value}
            scheduler.on_trial_result(None, past, seen)  # pyright: ignore[reportArgumentType]
    return scheduler


class _Past:
    """As much of a trial of Ray's as its scheduler looks at."""

    def __init__(self, name: str) -> None:
        self.trial_id, self.config = name, {"is_default": False}


def _trainable(trial: dict[str, Any], common: dict[str, Any]) -> None:
    """One trial in the process of a Ray Tune actor: every end but a kill is a report."""
    from ray import tune

    storage, base = open_storage(common["storage"]), Config.model_validate_json(common["config"])
    timeout_s = END_TIMEOUT_S + base.train.storage_patience_s
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(int(timeout_s))

    def report(rung: Rung, has_passed: bool) -> None:
        seen = {SCORE: rung.value, IMAGES: rung.images_seen, "has_passed": has_passed}
        tune.report(seen | {"rung": asdict(rung)})

    try:
        config = trial_config(base, trial["overrides"])
        run_trial(config, storage, common["inputs"], common["rungs"], report)
    except OURS as error:
        tune.report({"lost": str(error), "kind": type(error).__name__})
    except RaydiffusionError as error:
        tune.report({"failed": str(error)})
    except Exception:  # of anything: the search goes on without this trial
        tune.report({"failed": traceback.format_exc(limit=-3)})


class _Watcher:
    """Stands between Ray Tune and the records: gives it trials, and keeps what comes of them."""

    searcher: Any
    callback: Any

    def __init__(
        self,
        records: Records,
        source: Source,
        on_end: OnEnd,
        on_rung: Callable[[Entry, Rung], None],
        last_step: int,
        at_a_time: int,
    ) -> None:
        self.last_step, self.at_a_time = last_step, at_a_time
        self.records, self.source, self.on_end, self.on_rung = records, source, on_end, on_rung
        self.entries: dict[str, Entry] = {}
        self.rungs: dict[str, dict[int, Rung]] = {}
        self.started: dict[str, float] = {}
        self.errors: list[Exception] = []
        self.open: set[str] = set()  # trials that have begun and not ended
        self.last_seen_running = self.last_freed = time.monotonic()
        self.places: Places | None = None  # of trials that have workers of Ray Train

    @property
    def is_full(self) -> bool:
        return len(self.open) >= self.at_a_time

    def suggest(self) -> dict[str, Any] | None:
        """The next trial, as Ray Tune shows it; None where there is none."""
        if self.errors:
            return None
        try:
            entry = self.source()
            if entry is None:
                return None
            self.records.add(entry)
        except Exception as error:  # Ray Tune would wrap it
            self.errors.append(error)
            return None
        self.entries[entry.name], self.rungs[entry.name] = entry, {}
        self.open.add(entry.name)
        return {
            "name": entry.name,
            "overrides": list(entry.overrides),
            "is_default": entry.number == 0,
            **entry.choice,
        }

    def begin(self, name: str) -> None:
        self.started.setdefault(name, time.monotonic())

    def look(self, states: Mapping[str, str]) -> None:
        """Notices what Ray Tune does not tell: what it gave up, and that nothing runs any more."""
        for name in self.open & states.keys():
            if states[name] in ("ERROR", "TERMINATED"):
                self.open.discard(name)  # without a result: it is run again
        now = time.monotonic()
        if self.places is not None and now - self.last_freed > FREE_EVERY_S:
            self.last_freed = now
            try:
                self.places.free(of_the_dead=True)
            except Exception as error:  # a head that is busy; Ray's own table, which may change
                logger.warning("places of ended trials could not be looked for: %s", error)
        if not self.open or "RUNNING" in states.values():
            self.last_seen_running = now
        elif now - self.last_seen_running > IDLE_TIMEOUT_S:
            error = ClusterError(
                f"No trial has run for {IDLE_TIMEOUT_S / 60:.0f} minutes, and {len(self.open)} "
                "wait for a place. Bring back the nodes that have left, or lower "
                "train.cpus_per_worker, and run the same command again."
            )
            self.errors.append(error)
            raise error

    def take(self, name: str, result: Mapping[str, Any]) -> None:
        if "rung" in result and result["rung"]["step"] not in self.rungs[name]:
            rung = Rung(**result["rung"])
            self.rungs[name][rung.step] = rung
            self.on_rung(self.entries[name], rung)

    def end(self, name: str, last: Mapping[str, Any], reason: str) -> None:
        rungs = [self.rungs[name][step] for step in sorted(self.rungs[name])]
        seconds = time.monotonic() - self.started.get(name, time.monotonic())
        self.open.discard(name)
        if "lost" in last:
            self.errors.append(ERRORS[last["kind"]](last["lost"]))
            return
        reason = reason or last.get("failed", "")
        if reason:
            outcome = "failed"
        else:
            outcome = "finished" if rungs and rungs[-1].step >= self.last_step else "stopped"
        result = Result(outcome, rungs, seconds, reason)
        self.records.end(self.entries[name], result)
        self.on_end(self.entries[name], result)


def _make_watcher(
    records: Records,
    source: Source,
    on_end: OnEnd,
    on_rung: Callable[[Entry, Rung], None],
    last_step: int,
    at_a_time: int,
) -> _Watcher:
    """The watcher with Ray Tune's two interfaces to it; Ray is imported only here."""
    from ray.tune import Callback
    from ray.tune.search import Searcher

    watcher = _Watcher(records, source, on_end, on_rung, last_step, at_a_time)

    class GivenTrials(Searcher):
        """Asks the source, whatever Ray Tune's own idea of an order is."""

        def suggest(self, trial_id: str) -> Any:
            if watcher.is_full:  # Ray Tune asks again; its own limit loses places, see `look`
                return None
            return watcher.suggest() or Searcher.FINISHED

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            pass  # the callback below is told the same, with the trial's name

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

        def __reduce__(self) -> Any:  # Ray Tune pickles what it would restore; we do not restore
            return (Searcher, ())

    class Recorder(Callback):
        """Records every result before Ray Tune asks for the next trial."""

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            watcher.look({trial.config["name"]: trial.status for trial in trials})

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            watcher.begin(trial.config["name"])

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            watcher.take(trial.config["name"], result)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            self._end(trial, "")

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            lines = str(trial.get_error() or "").strip().splitlines()
            self._end(trial, f"its process died: {lines[-1] if lines else 'Ray does not say why'}")

        def _end(self, trial: Any, reason: str) -> None:
            try:
                watcher.end(trial.config["name"], trial.last_result or {}, reason)
            except Exception as error:  # Ray Tune would swallow or wrap it
                watcher.errors.append(error)

        def __reduce__(self) -> Any:
            return (Callback, ())

    watcher.searcher, watcher.callback = GivenTrials(metric=SCORE, mode="min"), Recorder()
    return watcher
