"""The Frechet distance to the validation split while training goes on, in tasks beside it.

Rank 0 leaves the EMA weights of a step in the storage root, one set at a time; the driver has a
Ray task draw samples from them and score these, and keeps the score. Nobody waits but the driver,
at the end, and not for long. A score that cannot be made is said, and harms nothing.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import safetensors.torch

from pipeline.checkpoints import Row, to_lines
from pipeline.cluster import place_tasks
from pipeline.dataset import class_counts, read_dataset
from pipeline.drawing import iter_drawn
from pipeline.errors import DataError, EvaluationError
from pipeline.extractors import load_extractor, score_name
from pipeline.features import SAMPLES_PER_FEATURE
from pipeline.fid_weights import list_named, step_of
from pipeline.host import keep_freed_memory, torch_threads
from pipeline.models import make_diffusion, make_unet
from pipeline.protocol import make_protocol
from pipeline.reference import read_features
from pipeline.scores.frechet import frechet_distance, sum_features
from pipeline.settings import Config
from pipeline.storage import open_storage
from pipeline.subjects import Network
from pipeline.training_views import TensorBoard
from pipeline.workflow import StepContext, hash_json

SPLIT = "validation"  # never test: who chooses by these scores must not spoil the final one
LOOK_EVERY_S = 2.0
LONGEST_END_S = 300.0  # that a finished training waits for its last score
SHOWN = 5  # steps in a note
INPUTS = ("preprocess", "features", "reference")


class Task(Protocol):
    """Something that scores one set of weights at a time, elsewhere."""

    def send(
        self, storage_uri: str, config_json: str, inputs: Mapping[str, Any], path: str, /
    ) -> None: ...
    def is_done(self) -> bool: ...
    def result(self) -> dict[str, Any]: ...
    def cancel(self) -> None: ...


@contextlib.contextmanager
def scores_beside(context: StepContext) -> Iterator["Scorer | None"]:
    """On the driver: scores what rank 0 leaves, on a thread, while the block runs.

    After the block it waits for what is left, `LONGEST_END_S` at most; not if it failed, and then
    the weights stay for the next attempt.

    Raises:
        DataError: too few images in the validation split.
    """
    if context.config.train.fid_every is None:
        yield None
        return
    scorer = Scorer(context)
    thread = threading.Thread(target=scorer.run, name="fid", daemon=True)
    thread.start()
    try:
        yield scorer
    except BaseException:
        scorer.leave()
        raise
    else:
        scorer.finish()
    finally:
        thread.join()


class Scorer:
    """Scores weights one set at a time, and keeps what came of it.

    Args:
        context: of the step `train`, with the manifests of `features` and `reference`.
        task: sends (storage URI, config as JSON, manifests, path of the weights) to be scored and
            returns a handle; a Ray task of `score_weights` where not given.
    """

    def __init__(self, context: StepContext, task: Task | None = None) -> None:
        config, inputs = context.config, context.inputs
        assert config.train.fid_every is not None
        num_features = inputs["features"]["metrics"]["num_features"]
        check_few(
            num_features,
            inputs["reference"]["metrics"]["counts"][SPLIT],
            config.train.fid_samples,
            wanted_by="train.fid_every",
            samples="train.fid_samples",
            instead="leave out train.fid_every",
        )
        self._context, self._every = context, config.train.fid_every
        self._storage = context.storage
        self._task: Task = task or RayTask()
        protocol = make_protocol(
            config,
            inputs["features"],
            inputs["reference"],
            split=SPLIT,
            num_samples=config.train.fid_samples,
        ) | {"first_sample": config.evaluate.num_samples}
        self.protocol = protocol
        self.metric = score_name("fid", inputs["features"])
        root = f"{context.series_directory}/fid"
        self.directory = f"{root}/{hash_json(protocol)}"
        for other in self._storage.list(root):  # weights that would wait for ever
            if f"{root}/{other}" != self.directory:
                self._storage.delete(f"{root}/{other}/weights")
        self._first_step: int | None = None
        self._reached = 0
        self._stop, self._ends_at, self._is_done = threading.Event(), 0.0, False
        self._running: str | None = None
        self._kept: dict[str, Row] = {}  # by name
        self._shown: list[str] | None = None
        self._board: TensorBoard | None = None
        self._trouble = ""

    def begin(self, first_step: int) -> None:
        """Says where training begins: it drops later scores that it will not come by again."""
        self._first_step = first_step

    def reach(self, step: int) -> None:
        """Says where training is: later scores, of an attempt before, are not shown yet."""
        self._reached = step

    def run(self) -> None:
        """Looks for weights and scores until `finish` or `leave`, and then for what is left."""
        while not self._stop.wait(LOOK_EVERY_S):
            self.look()
        told = False
        while (left := self._ends_at - time.monotonic()) > 0 and self.look():
            if not told:
                self._context.note(f"waiting for the last FID, at most {left:.0f} s")
            told = True
            time.sleep(LOOK_EVERY_S)
        with contextlib.suppress(Exception):  # Ray may be gone already, or the storage
            if self._running is not None:
                self._task.cancel()
            for name in self._list("weights") if self._is_done else []:
                self._context.note(
                    f"the FID at step {step_of(name):,} took too long and is left out"
                )
                self._storage.delete(f"{self.directory}/weights/{name}")
            if self._is_done:
                self._tell_left_out()

    def _tell_left_out(self) -> None:
        due = range(self._every, self._reached + 1, self._every)
        missing = sorted({*due} - {row["global_step"] for row in self.rows()})
        if missing:
            steps = ", ".join(f"{step:,}" for step in missing[:SHOWN])
            more = ", ..." if len(missing) > SHOWN else ""
            self._context.note(
                f"{len(missing):,} of {len(due):,} FIDs that were due were not made: at step "
                f"{steps}{more}"
            )

    def finish(self) -> None:
        """Has `run` end as training is done, after at most `LONGEST_END_S`."""
        self._reached, self._is_done = self._context.config.train.num_steps, True
        self._ends_at = time.monotonic() + LONGEST_END_S
        self._stop.set()

    def leave(self) -> None:
        """Has `run` end at once as training failed: the next attempt scores what is left."""
        self._stop.set()

    def look(self) -> bool:
        """Does what can be done at once; whether something is left to do."""
        try:
            self._drop_unconfirmed()
            if self._running is None:
                self._send_next()
            elif self._task.is_done():
                self._collect()
                self._send_next()
            self._show()
            self._trouble = ""
        except Exception as error:  # of storage or Ray: training must not fail for a score
            if str(error) != self._trouble:  # once, not each second
                self._context.note(f"no FID for now, training goes on: {error}")
            self._trouble = str(error)
        return self._running is not None

    def rows(self) -> list[Row]:
        """The scores up to where training is, by step."""
        names = [name.removesuffix(".json") for name in self._list("scores")]
        for name in names:
            if name not in self._kept:
                with contextlib.suppress(FileNotFoundError):  # dropped just now
                    content = self._storage.read(f"{self.directory}/scores/{name}.json")
                    self._kept[name] = json.loads(content)
        self._kept = {name: self._kept[name] for name in names if name in self._kept}
        return [row for row in self._kept.values() if row["global_step"] <= self._reached]

    def _drop_unconfirmed(self) -> None:
        """Drops what lies after the first step, where training will not come by."""
        if (first_step := self._first_step) is None:
            return
        for kind in ("weights", "scores"):
            for name in self._list(kind):
                if (step := step_of(name)) > first_step and step % self._every:
                    self._storage.delete(f"{self.directory}/{kind}/{name}")
        self._first_step = None  # once for each process that trains

    def _list(self, kind: str) -> list[str]:
        return list_named(self._storage, f"{self.directory}/{kind}")

    def _send_next(self) -> None:
        self._running = None
        for file in self._list("weights"):
            name, path = file.removesuffix(".safetensors"), f"{self.directory}/weights/{file}"
            if self._storage.exists(f"{self.directory}/scores/{name}.json"):
                self._storage.delete(path)  # the driver was killed between the two
                continue
            inputs = {step: dict(self._context.inputs[step]) for step in INPUTS}
            config = self._context.config.model_dump_json()
            self._task.send(self._storage.uri, config, inputs, path)
            self._running = name
            return

    def _collect(self) -> None:
        """Keeps what was scored; what the storage refuses is done again at the next look."""
        assert self._running is not None
        name = self._running
        step, path = step_of(name), f"{self.directory}/weights/{name}.safetensors"
        try:
            found = self._task.result()
        except Exception as error:  # of the task or of Ray
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            self._context.note(f"the FID at step {step:,} failed, training goes on: {first}")
            self._running = None
            self._storage.delete(path)
            return
        row = {"global_step": step, "metric": self.metric, **found, "protocol": self.protocol}
        record = f"{self.directory}/scores/{name}.json"
        self._storage.create(record, json.dumps(row).encode())
        if not self._storage.exists(path):  # training went back and came by other weights
            self._storage.delete(record)
            self._running = None
            return
        self._running = None
        self._storage.delete(path)
        self._context.note(
            f"{self.metric} {row['value']:.2f} at step {step:,} ({self.protocol['num_samples']:,} "
            f"samples, {self.protocol['reference_count']:,} validation images, "
            f"{row['seconds']:.0f} s)"
        )

    def _show(self) -> None:
        """Brings `fid.jsonl` and TensorBoard up to date, where something changed."""
        rows = self.rows()
        names = [name for name, row in self._kept.items() if row in rows]
        if names == self._shown:
            return
        directory = self._context.series_directory
        self._storage.replace(f"{directory}/fid.jsonl", to_lines(rows))
        if rows and self._board is None:
            # A run of its own: TensorBoard reads only the newest file of a directory.
            self._board = TensorBoard(self._storage, f"{directory}/tensorboard/fid", 0)
        for name, row in zip(names, rows, strict=True):
            if self._board is not None and name not in (self._shown or ()):
                self._board.add(row["global_step"], {f"validation/{row['metric']}": row["value"]})
        if self._board is not None:
            self._board.flush()
        self._shown = names


class RayTask:
    """`score_weights` as a Ray task of 1 CPU."""

    def __init__(self) -> None:
        self._handle: Any = None

    def send(
        self, storage_uri: str, config_json: str, inputs: Mapping[str, Any], path: str
    ) -> None:
        """Has it start as soon as a CPU is free."""
        import ray

        place, _ = place_tasks()
        task: Any = ray.remote(num_cpus=1, max_retries=1, **place)(score_weights)
        self._handle = task.remote(storage_uri, config_json, inputs, path)

    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        import ray

        return bool(ray.wait([self._handle], timeout=0)[0])

    def result(self) -> dict[str, Any]:
        """What it returned.

        Raises:
            Exception: what it raised, or Ray's error if it was lost.
        """
        import ray
        from ray.exceptions import RayTaskError

        try:
            return ray.get(self._handle)
        except RayTaskError as error:
            raise error.cause from error

    def cancel(self) -> None:
        """Ends it, wherever it is."""
        import ray

        ray.cancel(self._handle, force=True)


def score_weights(
    storage_uri: str, config_json: str, inputs: Mapping[str, Mapping[str, Any]], path: str
) -> dict[str, Any]:
    """The Frechet distance of weights to the validation split: `value` and `seconds`.

    The samples begin with the number after the last that `evaluate` scores: other noise.

    Args:
        storage_uri: of the root.
        config_json: the whole config.
        inputs: the manifests of `preprocess`, `features` and `reference`.
        path: of the weights, below the root.

    Raises:
        EvaluationError: the samples are not finite.
        StorageError: the weights or an input cannot be read.
    """
    started = time.monotonic()
    storage, config = open_storage(storage_uri), Config.model_validate_json(config_json)
    num_samples, before = config.train.fid_samples, config.evaluate.num_samples
    extractor = load_extractor(storage, inputs["features"])
    counts = None
    if config.model.class_conditional:
        counts = class_counts(read_dataset(storage, inputs["preprocess"]), "train")
    num_classes = None if counts is None else len(counts)
    model = make_unet(config, config.train.seed, num_classes)
    model.load_state_dict(safetensors.torch.load(storage.read(path)))
    network = Network(model, make_diffusion(config, num_classes), counts)
    keep_freed_memory()
    with torch_threads(1):
        reference = sum_features(read_features(storage, inputs["reference"], SPLIT))
        drawn = iter_drawn(config, network, extractor, num_samples, before)
        found = np.concatenate([features for _, features in drawn])
        value = frechet_distance(reference, sum_features(found))
    if not np.isfinite(value):
        raise EvaluationError(
            "The score is not finite: the features of the samples are not. Lower "
            "train.learning_rate."
        )
    return {"value": value, "seconds": time.monotonic() - started}


def check_few(
    num_features: int,
    num_images: int,
    num_samples: int,
    *,
    wanted_by: str,
    samples: str,
    instead: str,
) -> None:
    """Refuses a score whose reference would be thin, or of few samples.

    Args:
        num_features: of the extractor.
        num_images: in the validation split.
        num_samples: that are scored.
        wanted_by: the setting that wants the score.
        samples: the setting that says how many samples.
        instead: what does without the score, for people.

    Raises:
        DataError: fewer validation images or samples than 10 times the feature width.
    """
    needed = SAMPLES_PER_FEATURE * num_features
    if num_images < needed:
        raise DataError(
            f"{wanted_by} needs {SAMPLES_PER_FEATURE} x features.width = {needed} validation "
            f"images as its reference, and there are {num_images}. Raise data.validation_fraction, "
            f"lower features.width, or {instead}."
        )
    if num_samples < needed:
        raise DataError(
            f"{samples} must be at least {SAMPLES_PER_FEATURE} x features.width = {needed}, got "
            f"{num_samples}. Raise it or make the features narrower."
        )
