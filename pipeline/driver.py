"""From a config to a finished run: plan, preflight, Ray if it is needed, steps, record."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster import connect, total
from pipeline.config import absolute_source
from pipeline.errors import ConfigError
from pipeline.extractor_identity import UNREAD, identify_extractor
from pipeline.identities import OnHash
from pipeline.leases import OnWait, hold_lease
from pipeline.preflight import before_ray, on_cluster, require
from pipeline.runs import RunRecord, last_identities, run_id
from pipeline.settings import Config
from pipeline.sources import list_inputs
from pipeline.steps import STEP_NAMES, make_steps
from pipeline.storage import Storage, open_storage
from pipeline.subject_kinds import GivenImages, Subject, data_of_images
from pipeline.torchrun import torchrun_world
from pipeline.units import missing_units
from pipeline.workflow import (
    Event,
    Observer,
    PlannedStep,
    Resources,
    execute,
    needed_for,
    plan,
    read_artifact,
)

SHOWN = 3  # names of input shards in a plan


@dataclass(frozen=True)
class Plan:
    """What a command would do."""

    run: str
    storage: Storage
    steps: list[PlannedStep]
    missing_shards: list[str]  # input shards that would be preprocessed

    @property
    def is_cached(self) -> bool:
        """Whether nothing is left to do."""
        return all(p.action == "cached" for p in self.steps)

    @property
    def trains(self) -> bool:
        """Whether workers are needed."""
        return any(p.step.name == "train" and p.action != "cached" for p in self.steps)


@dataclass(frozen=True)
class Outcome:
    """What a command did: the plan it followed, each step's manifest, where the report is."""

    plan: Plan
    manifests: dict[str, dict[str, Any]]
    report: str | None


def make_plan(
    config: Config,
    targets: Sequence[str] = STEP_NAMES,
    *,
    subject: Subject | None = None,
    read_remote: bool = True,
    on_hash: OnHash | None = None,
) -> Plan:
    """Looks at the shards and at what is done, and says what is left. Starts nothing.

    Args:
        config: the whole config.
        targets: the steps wanted; what they rest on is planned too.
        subject: what is evaluated in place of the config's training.
        read_remote: whether remote files that were never seen are read to be hashed; otherwise
            the plan takes them for new, and the run has no name yet.
        on_hash: told the number of files and bytes that are about to be read.

    Raises:
        DataError: a source matches nothing or cannot be read.
        StorageError: the root cannot be read.
    """
    storage = open_storage(config.storage.root)
    inputs = list_inputs(config.data, storage, read_remote=read_remote, on_hash=on_hash)
    extractor = identify_extractor(
        config.features, storage, read_remote=read_remote, on_hash=on_hash
    )
    planned = plan(
        make_steps(config, inputs.shards, extractor, subject),
        storage,
        last_identities(storage, config.name),
    )
    missing = []
    if planned[0].action != "cached":
        missing = [shard.name for shard in missing_units(inputs.shards, config.data, storage)]
        names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        left = f"{len(missing):,} of {len(inputs.shards):,} input shards to do"
        reason = f"{planned[0].reason}; {left}" + (f": {names}" if names else "")
        planned[0] = replace(planned[0], reason=reason)
    is_known = UNREAD not in extractor.values()
    is_known = is_known and all(shard.sha256 is not None for shard in inputs.shards)
    run = run_id(config, planned) if is_known else f"{config.name}-?"
    return Plan(run, storage, needed_for(planned, targets), missing)


def run_config(
    config: Config,
    targets: Sequence[str] = STEP_NAMES,
    *,
    observer: Observer,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_wait: OnWait | None = None,
    on_hash: OnHash | None = None,
    wait_for_lease: bool = True,
    subject: Subject | None = None,
) -> Outcome:
    """Brings the targets about: what is cached is kept, what was begun is continued.

    Ray is started, or joined, only if a step has to run on it. What the preflight finds wrong is
    refused before any step starts; what it notes is told as a note of `preflight`.

    Args:
        config: the whole config.
        targets: the steps wanted.
        observer: told what happens.
        on_plan: told the plan that will be followed.
        on_wait: told while another process holds the run.
        on_hash: told the number of files and bytes that are read before there is a plan.
        wait_for_lease: for another process at the same run; otherwise leave at once.
        subject: what is evaluated in place of the config's training; see `find_subject`.

    Raises:
        RaydiffusionError: with the sentence for the user and the exit code.
    """
    is_scored = not set(targets) <= {"preprocess", "train"}
    if is_scored and config.data.is_sequence and not config.features.is_own:
        raise ConfigError(
            f"The extractor {config.features.extractor} is one of images, and data.sequence_shape "
            "makes sequences. Set features.extractor = 'package.module:factory' of your own, or "
            "use the verbs preprocess and train."
        )
    empty = [n for n in ("validation_fraction", "test_fraction") if not getattr(config.data, n)]
    if empty and is_scored:
        raise ConfigError(
            f"data.{empty[0]} is 0, and the score needs images that are held out. Raise it, or use "
            "the verbs preprocess and train."
        )
    planned = make_plan(config, targets, subject=subject, on_hash=on_hash)
    notes: list[str] = []
    if not planned.is_cached:
        notes = require(before_ray(config, planned.storage, trains=planned.trains))
    with hold_lease(planned.storage, f"runs/{planned.run}", wait=wait_for_lease, on_wait=on_wait):
        # Another may have worked while we waited.
        planned = make_plan(config, targets, subject=subject)
        on_plan(planned)
        record = RunRecord(planned.storage, planned.run, config, planned.steps)

        def observe(event: Event) -> None:
            record.observe(event)
            observer(event)

        outcome = "failed"
        try:
            _tell(notes, observe)
            with _capacity(config, planned, observe) as capacity:
                manifests = execute(
                    planned.steps,
                    config,
                    planned.storage,
                    capacity=capacity,
                    observer=observe,
                    wait_for_lease=wait_for_lease,
                )
            outcome = "done"
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM as Ray handles it
            outcome = "interrupted"
            raise
        finally:
            record.close(outcome)
        return Outcome(planned, manifests, _publish_report(planned, manifests))


def find_subject(
    config: Config, *, checkpoint: Path | None, images: Sequence[str], converts: bool = False
) -> Subject | None:
    """What a command wants evaluated in place of the config's training; None where nothing else.

    Args:
        config: the whole config.
        checkpoint: a model folder, or a checkpoint of another library.
        images: patterns, as those of `data.sources`.
        converts: whether images of another size or with other channels are taken.

    Raises:
        ConfigError: both are given.
        DataError: there is no such thing, or it does not suit the data set.
        StorageError: the root cannot be written.
    """
    if checkpoint is not None and images:
        raise ConfigError("--checkpoint and --images name two things to evaluate. Give one.")
    storage = open_storage(config.storage.root)
    if checkpoint is not None:
        from pipeline.subjects import import_model  # torch: only here

        return import_model(checkpoint, config, storage)
    if not images:
        return None
    data = data_of_images(config, [absolute_source(source, Path.cwd()) for source in images])
    shards = tuple(list_inputs(data, storage).shards)
    if not converts:
        from pipeline.given_images import check_images

        check_images(shards, config.data)
    return GivenImages(data.sources, shards)


def _tell(notes: Sequence[str], observer: Observer) -> None:
    for text in notes:
        observer(Event("note", "preflight", {"text": text}))


@contextlib.contextmanager
def _capacity(config: Config, planned: Plan, observer: Observer) -> Iterator[Resources]:
    """What the steps may use: a running Ray's resources, or none if no step asks for any."""
    needs_ray = any(
        p.action != "cached"
        and p.step.resources != Resources()
        and (p.step.name != "preprocess" or planned.missing_shards)
        and (p.step.name != "train" or torchrun_world() is None)
        for p in planned.steps
    )
    if not needs_ray:
        yield Resources()
        return
    with connect(config) as nodes:
        checks = on_cluster(
            config,
            planned.storage,
            nodes,
            trains=planned.trains and torchrun_world() is None,
            reads_input=bool(planned.missing_shards),
        )
        _tell(require(checks), observer)
        yield total(nodes)


def _publish_report(planned: Plan, manifests: dict[str, dict[str, Any]]) -> str | None:
    """Puts the report where the run is; the step's own copy stays with the step."""
    if "report" not in manifests:
        return None
    path = f"runs/{planned.run}/report.html"
    if not planned.storage.exists(path) or any(p.action != "cached" for p in planned.steps):
        content = read_artifact(planned.storage, manifests["report"], "report.html")
        planned.storage.replace(path, content)
    return f"{planned.storage.uri}/{path}"
