"""From a config to a finished run: plan, preflight, Ray if it is needed, steps, record."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.cluster import connect, total
from pipeline.config import override_config
from pipeline.errors import ConfigError
from pipeline.extractor_identity import UNREAD, identify_extractor
from pipeline.identities import OnHash
from pipeline.leases import OnWait, hold_lease
from pipeline.notify import tells_how_it_ended
from pipeline.preflight import before_ray, on_cluster, require
from pipeline.publish import UNKNOWN_COMMAND, publish_report, publish_search
from pipeline.registry import Registry
from pipeline.runs import RunRecord, last_identities, record_needs, run_id
from pipeline.settings import Config
from pipeline.sources import Inputs, list_inputs
from pipeline.steps import STEP_NAMES, Start, make_steps
from pipeline.storage import Storage, open_storage
from pipeline.subject_kinds import GivenModel, Subject
from pipeline.torchrun import torchrun_world
from pipeline.units import missing_units
from pipeline.workflow import (
    Event,
    Observer,
    PlannedStep,
    Resources,
    execute,
    hash_json,
    needed_for,
    plan,
    read_manifest,
)

BEFORE_TRAINING = {"preprocess", "features", "reference", "tune"}
SHOWN = 3  # names of input shards in a plan


@dataclass(frozen=True)
class Plan:
    """What a command would do."""

    run: str
    storage: Storage
    steps: list[PlannedStep]
    missing_shards: list[str]  # input shards that would be preprocessed
    config: Config  # of the steps: what a search recommends, where one is wanted and done

    @property
    def is_cached(self) -> bool:
        """Whether nothing is left to do."""
        return all(p.action == "cached" for p in self.steps)

    @property
    def trains(self) -> bool:
        """Whether workers are needed."""
        return self._does("train") or self._does("tune")

    @property
    def series(self) -> str | None:
        """The directory of the training to be made, below the root."""
        steps = [p for p in self.steps if p.step.name == "train" and p.action != "cached"]
        return steps[0].series_directory if steps else None

    @property
    def draws(self) -> bool:
        """Whether samples are drawn."""
        return self._does("evaluate")

    def _does(self, name: str) -> bool:
        return any(p.step.name == name and p.action != "cached" for p in self.steps)

    @property
    def searches(self) -> bool:
        """Whether what follows the search is planned again when that is done."""
        follows = any(p.step.name == "train" for p in self.steps)
        return self.config.tune.enabled and self._does("tune") and follows


@dataclass(frozen=True)
class Basis:
    """What the registry gives a plan.

    Args:
        pinned: manifests by step name whose results are taken in place of the step's own.
        start: what training begins from; random weights if not given.
        evaluation: the number of the pinned one.
        inputs: the input that the work keeps to; it is listed anew if not given.
    """

    pinned: Mapping[str, Mapping[str, Any]]
    start: Start | None = None
    evaluation: int = 0
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Outcome:
    """What a command did: the plan it followed, each step's manifest, where the pages are."""

    plan: Plan
    manifests: dict[str, dict[str, Any]]
    report: str | None
    search: str | None = None


def make_plan(
    config: Config,
    targets: Sequence[str] = STEP_NAMES,
    *,
    subject: Subject | None = None,
    basis: Basis | None = None,
    read_remote: bool = True,
    on_hash: OnHash | None = None,
) -> Plan:
    """Looks at the shards and at what is done, and says what is left. Starts nothing.

    Args:
        config: the whole config.
        targets: the steps wanted; what they rest on is planned too.
        subject: what is evaluated in place of the config's training.
        basis: what the registry gives; without it, everything is as the config says.
        read_remote: whether remote files that were never seen are read to be hashed; otherwise
            the plan takes them for new, and the run has no name yet.
        on_hash: told the number of files and bytes that are about to be read.

    Raises:
        DataError: a source matches nothing or cannot be read.
        StorageError: the root cannot be read.
    """
    storage = open_storage(config.storage.root)
    basis = basis or Basis({}, evaluation=len(Registry(storage, config.name).evaluations()))
    inputs = basis.inputs or list_inputs(
        config.data, storage, read_remote=read_remote, on_hash=on_hash
    )
    extractor = identify_extractor(
        config.features, storage, read_remote=read_remote, on_hash=on_hash
    )
    given: dict[str, Any] = {
        "start": basis.start,
        "evaluation": basis.evaluation,
        "listed": basis.inputs,
    }
    steps = make_steps(config, inputs.shards, extractor, subject, **given)
    last = last_identities(storage, config.name, [step.name for step in steps])
    planned = plan(steps, storage, last, basis.pinned)
    run, search = run_id(config, planned), None
    if config.tune.enabled and subject is None and not set(targets) <= BEFORE_TRAINING:
        search = next(p for p in planned if p.step.name == "tune")
        run = f"{config.name}-{hash_json([run, search.key])[:8]}"  # one, before and after
        if (found := read_manifest(storage, "tune", search.key)) is None:
            planned = [_until_tuned(p) for p in planned]
        else:
            config = recommended_config(config, found)
            steps = make_steps(config, inputs.shards, extractor, **given)
            planned = [search if p.step.name == "tune" else p for p in plan(steps, storage, last)]
    missing = []
    if planned[0].action != "cached":
        missing = [shard.name for shard in missing_units(inputs.shards, config.data, storage)]
        names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        left = f"{len(missing):,} of {len(inputs.shards):,} input shards to do"
        reason = f"{planned[0].reason}; {left}" + (f": {names}" if names else "")
        planned[0] = replace(planned[0], reason=reason)
    is_known = UNREAD not in extractor.values()
    is_known = is_known and all(shard.sha256 is not None for shard in inputs.shards)
    if not is_known:
        run = f"{config.name}-?"
    wanted = targets if search is None else ("tune", *targets)
    return Plan(run, storage, needed_for(planned, wanted), missing, config)


def recommended_config(config: Config, found: Mapping[str, Any]) -> Config:
    """The config that a finished search recommends, as its `run --set ...` would make it.

    Args:
        config: that was searched around.
        found: the manifest of the step `tune`.
    """
    return override_config(config, [*found["metrics"]["overrides"], "tune.enabled=false"])


def _until_tuned(p: PlannedStep) -> PlannedStep:
    """A step whose config the search is still to choose."""
    if p.step.name in BEFORE_TRAINING:
        return p
    return replace(p, action="run", reason="its config is what tune recommends: planned again then")


@tells_how_it_ended
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
    basis: Basis | None = None,
    command: str = UNKNOWN_COMMAND,
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
        subject: what is evaluated in place of the config's training; see `find_subject` of
            `subject_kinds.py`.
        basis: what the registry gives; without it, everything is as the config says.
        command: what runs the config, as typed into a shell after `raydiffusion`, for pages.

    Raises:
        RaydiffusionError: with the sentence for the user and the exit code.
        SystemExit: the process was told to end; what is done is kept.
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
    wanted = "tune" in targets
    if wanted and (faults := config.faults_of_tune() + config.faults_of_new(searches=True)):
        raise ConfigError("\n  ".join([f"{config.name} cannot be tuned:", *faults]))
    planned = make_plan(config, targets, subject=subject, basis=basis, on_hash=on_hash)
    if planned.searches and torchrun_world() is not None:
        raise ConfigError(
            "Under torchrun nothing is searched, and tune.enabled asks for a search that is not "
            "done. Run `raydiffusion tune` without torchrun first, or set tune.enabled = false."
        )
    notes = _look_ahead(config, planned)
    with hold_lease(planned.storage, f"runs/{planned.run}", wait=wait_for_lease, on_wait=on_wait):
        # Another may have worked while we waited.
        planned = make_plan(config, targets, subject=subject, basis=basis)
        on_plan(planned)
        record = RunRecord(planned.storage, planned.run, config, planned.steps, command)
        if record.has_waited:  # for a clean-up, which may have deleted what was there
            planned = make_plan(config, targets, subject=subject, basis=basis)
            record.plan_again(planned.steps)
            on_plan(planned)

        def observe(event: Event) -> None:
            record.observe(event)
            observer(event)

        outcome = "failed"
        try:
            _tell(notes, observe)
            if isinstance(subject, GivenModel):
                from pipeline.subjects import copy_again  # torch: only here

                copy_again(subject, config, planned.storage)
            manifests: dict[str, dict[str, Any]] = {}
            with _capacity(config, planned, observe) as capacity:

                def go_through(steps: Sequence[PlannedStep]) -> None:
                    manifests.update(
                        execute(
                            steps,
                            planned.config,
                            planned.storage,
                            capacity=capacity,
                            observer=observe,
                            wait_for_lease=wait_for_lease,
                            known=manifests,
                        )
                    )

                if planned.searches:
                    go_through(needed_for(planned.steps, ("tune",)))
                    planned = make_plan(config, targets, basis=basis)
                    record.plan_again(planned.steps)
                    on_plan(planned)
                go_through(planned.steps)
            outcome = "done"
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM where it is handled
            outcome = "interrupted"
            raise
        finally:
            record.close(outcome)
        return _publish(planned, manifests, command)


def bring_about(
    config: Config,
    targets: Sequence[str],
    *,
    basis: Basis,
    observer: Observer,
    subject: Subject | None = None,
    on_hash: OnHash | None = None,
) -> dict[str, dict[str, Any]]:
    """Brings targets about within a cycle that this process holds, without a run of their own.

    Args:
        config: the whole config.
        targets: the steps wanted.
        basis: what the registry gives.
        observer: told what happens.
        subject: what is evaluated in place of the config's training.
        on_hash: told the number of files and bytes that are read before there is a plan.

    Returns:
        The manifests of the targets and of what they rest on, by step name.

    Raises:
        RaydiffusionError: with the sentence for the user and the exit code.
    """
    planned = make_plan(config, targets, subject=subject, basis=basis, on_hash=on_hash)
    if record_needs(planned.storage, config.name, planned.steps):
        planned = make_plan(config, targets, subject=subject, basis=basis)
    _tell(_look_ahead(config, planned), observer)
    with _capacity(config, planned, observer) as capacity:
        return execute(
            planned.steps,
            planned.config,
            planned.storage,
            capacity=capacity,
            observer=observer,
        )


def _publish(planned: Plan, manifests: dict[str, dict[str, Any]], command: str) -> Outcome:
    """Puts the pages where the run is."""
    report = search = None
    is_new = any(p.action != "cached" for p in planned.steps)
    if "report" in manifests:
        report = publish_report(planned.storage, planned.run, manifests["report"], is_new)
    if "tune" in manifests:
        search = publish_search(planned.storage, planned.run, manifests["tune"], command)
    return Outcome(planned, manifests, report, search)


def _look_ahead(config: Config, planned: Plan) -> list[str]:
    """What the preflight notes before there is Ray; what it finds wrong is raised."""
    if planned.is_cached:
        return []
    checks = before_ray(
        config,
        planned.storage,
        trains=planned.trains,
        draws=planned.draws,
        series=planned.series,
    )
    return require(checks)


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
            draws=planned.draws,
            reads_input=bool(planned.missing_shards),
        )
        _tell(require(checks), observer)
        yield total(nodes)
