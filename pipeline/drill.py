"""Drills: a short training of a config on this machine, struck once in the middle.

What is struck is real, and so is everything that has to cope with it: the same driver, workers,
checkpoints and Ray as in a run.

worker: SIGKILL of the process of the last rank; Ray Train starts a new group.
driver: SIGKILL of the process that runs the workflow, with which its Ray ends; it is started again
    at once, as a person or a scheduler would.
node: SIGKILL of everything on the second of two Ray nodes of this machine (`two_nodes.py`), while
    `train.num_workers` is [1, 2]; training goes on with one worker.
storage: a file takes the place of the storage root, so that every process that reads or writes
    below it meets an error of the file system, also one of root, whom permissions would not stop.
    It is away until `outage_s` after the next checkpoint was due.

All is kept in a temporary directory that goes afterwards, with every process. The config's own
storage root is only read, but for the hashes of its sources; a data set that lies there,
preprocessed, is linked to.
"""

import contextlib
import enum
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.driver import make_plan
from pipeline.errors import ERRORS, ClusterError, ConfigError, RaydiffusionError, StorageError
from pipeline.recovery import Recovery, measure
from pipeline.scratch import scratch_place
from pipeline.settings import NOISE_GROUP, Config
from pipeline.storage import LocalStorage, open_storage
from pipeline.trace import VARIABLE as TRACE_VARIABLE
from pipeline.trace import TraceReader
from pipeline.two_nodes import two_nodes
from pipeline.workflow import read_artifact, read_manifest

NUM_STEPS, NUM_CHECKPOINTS = 300, 10
OUTAGE_S = 10.0
LONGEST_RECOVERY_S = 900.0
POLL_S = 0.02

Tell = Callable[[str], None]


class Kind(enum.StrEnum):
    """What is struck."""

    worker = "worker"
    driver = "driver"
    node = "node"
    storage = "storage"


@dataclass(frozen=True)
class Drill:
    """What came of a drill; `error` is what the training ended with."""

    kind: Kind
    num_steps: int
    checkpoint_every: int
    recovery: Recovery
    seconds: float
    error: RaydiffusionError | None

    @property
    def exit_code(self) -> int:
        """0 when the training recovered and ended well, else that of its failure."""
        return 0 if self.error is None else self.error.exit_code


def run_drill(
    config: Config,
    kind: Kind,
    *,
    num_steps: int = NUM_STEPS,
    outage_s: float = OUTAGE_S,
    tell: Tell = lambda text: None,
) -> Drill:
    """Trains, strikes, waits for the end, and leaves nothing behind.

    Args:
        config: the whole config; what `shorten` says is changed.
        kind: what is struck.
        num_steps: of the training; the strike comes half a checkpoint interval after its middle.
        outage_s: how long storage stays away, once a checkpoint is due.
        tell: told in words what happens.

    Raises:
        ConfigError: the config cannot be drilled this way, or the training was over too soon.
        RaydiffusionError: the training failed before it was struck.
    """
    if not 0 <= outage_s < math.inf:
        raise ConfigError(f"--outage takes seconds from 0 on, got {outage_s:g}. Change it.")
    started = time.monotonic()
    with scratch_place() as (scratch, environment):
        short = shorten(config, kind, num_steps, str(scratch / "storage"))
        if link_data_set(config, short):
            tell("the preprocessed data set of the config is used")
        with contextlib.ExitStack() as opened:
            short, remove_node = opened.enter_context(_cluster(short, kind, scratch, environment))
            running = opened.enter_context(
                contextlib.closing(_Training(short, scratch, environment))
            )
            strike_at = num_steps // 2 + short.train.checkpoint_every // 2
            tell(f"training {num_steps:,} steps; the {kind} is struck after step {strike_at:,}")
            running.wait_for_step(strike_at)
            struck_at = time.time()
            match kind:
                case Kind.worker:
                    tell(f"SIGKILL to worker {running.kill_worker()}")
                case Kind.driver:
                    running.kill_driver()
                    tell("SIGKILL to the driver; it is started again")
                case Kind.node:
                    remove_node()
                    tell("the second node is gone")
                case Kind.storage:
                    tell("the storage root is gone")
                    running.take_storage_away(outage_s)
                    tell("the storage root is back")
            error = running.wait_for_end(struck_at)
        recovery = measure(running.trace.rows, struck_at)
        if kind == Kind.storage and recovery.resumed_from is None and error is None:
            recovery = running.with_checkpoint(recovery, struck_at)
        if error is None and recovery.seconds_to_recover is None:
            raise _over_too_soon(strike_at, num_steps)
    every = short.train.checkpoint_every
    return Drill(kind, num_steps, every, recovery, time.monotonic() - started, error)


def shorten(config: Config, kind: Kind, num_steps: int, root: str) -> Config:
    """The config of a drill: so many steps, ten checkpoints, a row of metrics for each step.

    Validation, samples and scores on the way are left out. For `node` there are [1, 2] workers.

    Args:
        config: the whole config.
        kind: what is struck.
        num_steps: of the training.
        root: of the storage.

    Raises:
        ConfigError: too few steps, or a config that two nodes of one machine cannot have.
    """
    if num_steps < NUM_CHECKPOINTS:
        raise ConfigError(
            f"A drill needs at least {NUM_CHECKPOINTS} steps, got {num_steps}. Raise --steps."
        )
    train: dict[str, Any] = {
        "num_steps": num_steps,
        "checkpoint_every": num_steps // NUM_CHECKPOINTS,
        "keep_every": None,
        "log_every": 1,
        "validate_every": None,
        "sample_every": None,
        "fid_every": None,
    }
    if kind == Kind.node:
        if config.train.use_gpu:
            raise ConfigError(
                "A drill of a node shares this machine's CPUs out to two nodes, and cannot do so "
                "with GPUs. Add --set train.use_gpu=false."
            )
        if config.train.global_batch_size < 2 * NOISE_GROUP:
            raise ConfigError(
                f"A drill of a node needs two workers, and train.global_batch_size = "
                f"{config.train.global_batch_size} is enough for one. Add --set "
                f"train.global_batch_size={2 * NOISE_GROUP}."
            )
        train["num_workers"] = (1, 2)
    return config.model_copy(
        update={
            "storage": config.storage.model_copy(update={"root": root}),
            "train": config.train.model_copy(update=train),
            "tune": config.tune.model_copy(update={"enabled": False}),
            "cluster": config.cluster.model_copy(update={"address": None}),
        }
    )


class _Training:
    """The driver of a drill, what it does, and the ways to strike it."""

    def __init__(self, config: Config, scratch: Path, environment: Mapping[str, str]) -> None:
        self._scratch, self._root = scratch, Path(config.storage.root)
        self._environment = {**environment, TRACE_VARIABLE: str(scratch / "trace.jsonl")}
        self.trace = TraceReader(scratch / "trace.jsonl")
        self._num_steps = config.train.num_steps
        self._checkpoint_every = config.train.checkpoint_every
        self._completed_at: dict[int, float] = {}  # checkpoints, by step, when they were seen
        (scratch / "config.json").write_text(config.model_dump_json())
        self._start()

    def _start(self) -> None:
        with (self._scratch / "driver.log").open("ab") as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-m", "pipeline.drill_driver", "config.json", "outcome.json"],
                cwd=self._scratch,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the drill, which then clears up
            )

    def close(self) -> None:
        """Ends the driver, if it still runs."""
        self._driver.kill()
        self._driver.wait()

    def _look(self) -> bool:
        """Takes in what is new; whether the driver still runs."""
        runs = self._driver.poll() is None
        self.trace.read()
        for path in self._root.glob("steps/train/*/checkpoints/*/manifest.json"):
            self._completed_at.setdefault(int(path.parent.name), time.time())
        time.sleep(POLL_S)
        return runs

    def _has_reached(self, step: int) -> bool:
        return bool(self.trace.rows) and self.trace.rows[-1]["global_step"] >= step

    def wait_for_step(self, step: int) -> None:
        """Until the training has made so many steps."""
        while not self._has_reached(step):
            if not self._look():
                if (error := self._error()) is not None:
                    raise error
                raise _over_too_soon(step, self._num_steps)

    def wait_for_end(self, struck_at: float) -> RaydiffusionError | None:
        """Until the driver ends; its error, if it ended with one."""
        while self._look():
            if time.time() - struck_at > LONGEST_RECOVERY_S:
                return ClusterError(
                    f"The training was still at work {LONGEST_RECOVERY_S:,.0f} s after the strike. "
                    "Make the drill shorter with --steps, or see why it hangs."
                )
        return self._error()

    def _error(self) -> RaydiffusionError | None:
        if self._driver.returncode == 0:
            return None
        try:
            outcome = json.loads((self._scratch / "outcome.json").read_text())
            return ERRORS[outcome["kind"]](outcome["error"])
        except (FileNotFoundError, KeyError):  # it died without a word of ours
            lines = (self._scratch / "driver.log").read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "it printed nothing"
            return RaydiffusionError(
                f"The driver ended with exit code {self._driver.returncode}: {last}. Run `train` "
                "with the same config to see more."
            )

    def kill_worker(self) -> int:
        """SIGKILLs the process of the last rank; the rank."""
        victim = max(
            (e for e in self.trace.began if e["at"] >= self._group_began_at()),
            key=lambda entry: entry["rank"],
        )
        try:
            os.kill(victim["pid"], signal.SIGKILL)
        except ProcessLookupError:  # it was done meanwhile
            raise _over_too_soon(self._num_steps, self._num_steps) from None
        return victim["rank"]

    def _group_began_at(self) -> float:
        """When the present group of workers did: no rank of it before its first."""
        size = self.trace.began[-1]["world_size"]
        return min(entry["at"] for entry in self.trace.began[-size:])

    def kill_driver(self) -> None:
        """SIGKILLs the driver and starts it again."""
        self._driver.kill()
        self._driver.wait()
        self._start()

    def take_storage_away(self, outage_s: float) -> None:
        """Puts a file in the place of the root, and the root back when it was missed."""
        due = self.trace.rows[-1]["global_step"] // self._checkpoint_every + 1
        away = self._root.with_name("away")
        nothing = self._scratch / "gone"
        nothing.touch()
        with contextlib.ExitStack() as back:
            self._root.rename(away)
            back.callback(self._put_as_root, away)
            self._put_as_root(nothing)
            while not self._has_reached(due * self._checkpoint_every - 1) and self._look():
                pass
            missed_at = time.monotonic()
            while time.monotonic() - missed_at < outage_s and self._look():
                pass

    def _put_as_root(self, path: Path) -> None:
        """A file or a directory; what was written there just now is lost, as it would be."""
        while True:
            try:
                path.rename(self._root)
                return
            except OSError:  # the other kind is there, or a writer has made a directory meanwhile
                if self._root.is_dir():
                    shutil.rmtree(self._root, ignore_errors=True)
                else:
                    self._root.unlink(missing_ok=True)

    def with_checkpoint(self, recovery: Recovery, struck_at: float) -> Recovery:
        """For storage, where no step is lost: recovered with the first complete checkpoint."""
        at = min((t for t in self._completed_at.values() if t > struck_at), default=None)
        if at is None:
            return recovery
        return replace(recovery, steps_lost=0, seconds_to_recover=at - struck_at)


def _over_too_soon(strike_at: int, num_steps: int) -> ConfigError:
    return ConfigError(
        f"The training was over before it could be struck at step {strike_at:,} and recover. Give "
        f"it more steps: --steps {10 * num_steps}."
    )


@contextlib.contextmanager
def _cluster(
    config: Config, kind: Kind, scratch: Path, environment: Mapping[str, str]
) -> Iterator[tuple[Config, Callable[[], None]]]:
    """For `node` two of them, joined by the config; otherwise the driver starts its own Ray."""
    if kind != Kind.node:
        yield config, lambda: None
        return
    cpus = config.train.cpus_per_worker
    with (
        (scratch / "cluster.log").open("ab") as log,
        two_nodes(cpus, {**environment, "RAY_TMPDIR": str(scratch)}, log.fileno()) as started,
    ):
        address, tell_nodes = started
        cluster = config.cluster.model_copy(update={"address": address})
        yield config.model_copy(update={"cluster": cluster}), partial(tell_nodes, "remove")


def link_data_set(config: Config, short: Config) -> bool:
    """Links to the preprocessed data set in the config's own root, if there is one to link to."""
    storage = open_storage(config.storage.root)
    if not isinstance(storage, LocalStorage) or not Path(storage.uri).is_dir():
        return False
    try:
        preprocess = make_plan(config, ("preprocess",), read_remote=False).steps[0]
        manifest = read_manifest(storage, "preprocess", preprocess.key)
        if manifest is None or preprocess.action != "cached":  # or shards of it are gone
            return False
        shards = json.loads(read_artifact(storage, manifest, "dataset.json"))["shards"]
    except StorageError:  # damaged: it is made anew
        return False
    for directory in {preprocess.directory, *(shard["directory"] for shard in shards)}:
        link = Path(short.storage.root, directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(storage.uri, directory), target_is_directory=True)
    known = Path(storage.uri, "cache")  # hashes of the sources
    shutil.copytree(known, Path(short.storage.root, "cache"), dirs_exist_ok=True)
    return True
