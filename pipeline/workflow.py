"""The durable workflow: steps keyed by what determines them, done once, resumed by rerunning.

A step is done if and only if its manifest exists. Its key hashes the step's version, its slice
of the config and its inputs' keys, so that the same command finds finished work, and a change
reruns just what depends on it. `plan` tells beforehand what will run and why; `execute` does
it, side by side where the declared resources fit, and says what happened through events.
The steps of this project are listed in `steps.py`; the record of a run is kept by `runs.py`.
"""

import hashlib
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pipeline.checkpoint_steps import complete_steps
from pipeline.errors import StorageError
from pipeline.leases import hold_lease
from pipeline.settings import Config
from pipeline.storage import (
    Content,
    Storage,
    damaged,
    hash_content,
    hashed_name,
    size_of_content,
)

LIBRARIES = ("raydiffusion", "torch", "ray", "pyarrow", "torchmetrics", "numpy", "pillow")


@dataclass(frozen=True)
class Resources:
    """The most a step uses at once on the cluster."""

    cpus: int = 0
    gpus: int = 0


@dataclass(frozen=True)
class Step:
    """One node of the workflow.

    Args:
        name: also the directory of its results.
        version: raised by hand when the step's code makes something else of the same inputs.
        function: `module:name`, called with a `StepContext`, returns the step's metrics.
        settings: the slice of the config, and of the world, that determines the result.
        inputs: names of the steps it reads.
        after: names of steps that it needs done, though they do not determine its result: they
            are no part of its key, and nothing of them runs for it once it is done.
        resources: its peak on the cluster; none at all means it runs in the driver.
        extensible: the setting that may grow without starting anew (`train.num_steps`).
        given: what the function would otherwise find out by itself; the settings have its hash.
        parts: directories that its result rests on, all below one, and that it makes: it runs again
            where one is gone.
    """

    name: str
    version: int
    function: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    resources: Resources = Resources()
    extensible: str | None = None
    given: Any = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something that happened while a workflow ran; `fields` is JSON."""

    kind: Literal["waiting", "started", "progress", "note", "finished", "failed", "cached"]
    step: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to a step, and why."""

    step: Step
    key: str
    identity: Mapping[str, Any]
    series: str
    action: Literal["cached", "run", "extend"]
    reason: str

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that must be done before it runs."""
        return self.step.inputs if self.action == "cached" else self.step.inputs + self.step.after

    @property
    def directory(self) -> str:
        """Where its results are, below the storage root."""
        return f"steps/{self.step.name}/{self.key}"

    @property
    def series_directory(self) -> str:
        """Where it keeps what a longer run of the same can continue from."""
        return f"steps/{self.step.name}/{self.series}"


@dataclass
class StepContext:
    """What a step's function gets: its config, its inputs, and a place to write."""

    config: Config
    storage: Storage
    planned: PlannedStep
    inputs: Mapping[str, Mapping[str, Any]]  # manifests by step name
    observer: Observer
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    scratch: list[str] = field(default_factory=list)  # deleted once the manifest is there

    @property
    def directory(self) -> str:
        """Where the step writes."""
        return self.planned.directory

    @property
    def series_directory(self) -> str:
        """Where it keeps what a longer run of the same can continue from."""
        return self.planned.series_directory

    def write_artifact(self, name: str, content: Content) -> None:
        """Writes a file of the step's result and records it for the manifest.

        The file's name holds the hash of its content, so that a late zombie of this step cannot
        change what a manifest already names.
        """
        sha256 = hash_content(content)
        file = hashed_name(name, sha256)
        self.storage.create(f"{self.directory}/{file}", content)
        self.artifacts[name] = {"file": file, "bytes": size_of_content(content), "sha256": sha256}

    def read_input(self, step: str, name: str) -> bytes:
        """Reads a file that an input step made, verified by its hash."""
        manifest = self.inputs[step]
        return read_artifact(self.storage, manifest, name)

    def progress(self, done: float, total: float, unit: str, **details: Any) -> None:
        """Says how far the step is; `details` may hold a rate, a loss, a time left."""
        fields = {"done": done, "total": total, "unit": unit, **details}
        self.observer(Event("progress", self.planned.step.name, fields))

    def note(self, text: str) -> None:
        """Says something a person should know."""
        self.observer(Event("note", self.planned.step.name, {"text": text}))


def read_artifact(storage: Storage, manifest: Mapping[str, Any], name: str) -> bytes:
    """Reads a file of a finished step.

    Raises:
        StorageError: it is missing or damaged.
    """
    artifact = manifest["artifacts"][name]
    path = f"steps/{manifest['step']}/{manifest['key']}/{artifact['file']}"
    try:
        content = storage.read(path)
    except FileNotFoundError as error:
        raise damaged(storage, path) from error
    if hashlib.sha256(content).hexdigest() != artifact["sha256"]:
        raise damaged(storage, path)
    return content


def plan(
    steps: Sequence[Step],
    storage: Storage,
    previous: Mapping[str, Any] | None = None,
    pinned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[PlannedStep]:
    """Decides for each step whether it is cached, runs, or extends, and why.

    Args:
        steps: in topological order.
        storage: the root.
        previous: identities by step name of the last run, to name what changed.
        pinned: manifests by step name whose results are taken in place of the step's own.
    """
    planned: dict[str, PlannedStep] = {}
    for step in steps:
        if pinned and step.name in pinned:
            key, identity = (pinned[step.name][part] for part in ("key", "identity"))
            given = replace(step, inputs=(), after=())
            reason = "its result is the one that the registry names"
            planned[step.name] = PlannedStep(given, key, identity, key, "cached", reason)
            continue
        identity = {
            "step": step.name,
            "version": step.version,
            "settings": json.loads(json.dumps(dict(step.settings))),  # as it will be read again
            "inputs": {name: planned[name].key for name in step.inputs},
        }
        key = hash_json(identity)
        kept = {k: v for k, v in step.settings.items() if k != step.extensible}
        series = hash_json(identity | {"settings": kept}) if step.extensible else key
        action, reason = "run", _reason(identity, (previous or {}).get(step.name), planned)
        if read_manifest(storage, step.name, key) is not None:
            if gone := _parts_gone(storage, step):
                reason = f"{gone:,} of the {len(step.parts):,} shards of its result are gone"
            else:
                action, reason = "cached", "its result is there"
        elif step.extensible is not None:
            done = complete_steps(storage, f"steps/{step.name}/{series}")
            if reached := [n for n in done if n <= step.settings[step.extensible]]:
                action = "extend"
                reason = f"continues from the checkpoint at step {max(reached):,}"
        planned[step.name] = PlannedStep(step, key, identity, series, action, reason)
    return list(planned.values())


def needed_for(planned: Sequence[PlannedStep], targets: Sequence[str]) -> list[PlannedStep]:
    """The planned steps that the targets rest on, the targets included."""
    names = set(targets)
    for p in reversed(planned):
        if p.step.name in names:
            names.update(p.needs)
    return [p for p in planned if p.step.name in names]


def execute(
    planned: Sequence[PlannedStep],
    config: Config,
    storage: Storage,
    *,
    capacity: Resources,
    observer: Observer,
    wait_for_lease: bool = True,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs what is not cached and returns all manifests by step name.

    Steps whose inputs are there run side by side while the sum of their resources fits the
    capacity, otherwise one after the other. The first failure lets the running ones finish,
    starts no more, and is raised. Steps whose manifests are `known`, from an earlier call, are
    passed over.

    Raises:
        RaydiffusionError: a step's own.
        SystemExit: a step was told to end.
    """
    manifests = dict(known or {})
    waiting = [p for p in planned if p.step.name not in manifests]
    running: dict[Future[dict[str, Any]], PlannedStep] = {}
    failure: BaseException | None = None
    pool = ThreadPoolExecutor(max_workers=max(1, len(planned)), thread_name_prefix="step")
    try:
        while (waiting and failure is None) or running:
            for p in list(waiting) if failure is None else []:
                ready = all(name in manifests for name in p.needs)
                if not ready or not _fits(p.step, running.values(), capacity):
                    continue
                waiting.remove(p)
                future = pool.submit(
                    _run_step, p, config, storage, dict(manifests), observer, wait_for_lease
                )
                running[future] = p
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                p = running.pop(future)
                error = future.exception()
                if error is None:
                    manifests[p.step.name] = future.result()
                    continue
                if not isinstance(error, SystemExit):  # told to end
                    observer(Event("failed", p.step.name, {"error": str(error)}))
                failure = failure or error
    finally:
        # Interrupted, the threads of running steps end with the process; nobody waits for them.
        pool.shutdown(wait=not running, cancel_futures=True)
    if failure is not None:
        raise failure
    return manifests


def read_manifest(storage: Storage, step: str, key: str) -> dict[str, Any] | None:
    """The manifest of a finished step, or None."""
    path = f"steps/{step}/{key}/manifest.json"
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        return None
    except ValueError as error:  # no JSON, or no text
        raise damaged(storage, path) from error


def _parts_gone(storage: Storage, step: Step) -> int:
    """How many of the parts that a step's result rests on somebody has deleted."""
    if not step.parts:
        return 0
    there = set(storage.list(step.parts[0].rpartition("/")[0]))
    return sum(part.rpartition("/")[2] not in there for part in step.parts)


def hash_json(value: Any) -> str:
    """A stable name for a JSON value: 32 hex digits of the SHA-256 of its canonical text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _run_step(
    p: PlannedStep,
    config: Config,
    storage: Storage,
    inputs: Mapping[str, Mapping[str, Any]],
    observer: Observer,
    wait_for_lease: bool,
) -> dict[str, Any]:
    name = p.step.name

    def finished() -> dict[str, Any] | None:
        manifest = read_manifest(storage, name, p.key)
        return None if manifest is None or _parts_gone(storage, p.step) else manifest

    if (manifest := finished()) is not None:
        observer(Event("cached", name, {"seconds": manifest["seconds"]}))
        return manifest

    def on_wait(holder: dict[str, Any], left_s: float) -> None:
        observer(Event("waiting", name, {"holder": holder, "left_s": left_s}))

    with hold_lease(
        storage,
        p.series_directory,
        wait=wait_for_lease,
        on_wait=on_wait,
        is_done=lambda: finished() is not None,
    ):
        if (manifest := finished()) is not None:  # made by another while we waited
            observer(Event("cached", name, {"seconds": manifest["seconds"]}))
            return manifest
        observer(Event("started", name, {"action": p.action, "reason": p.reason}))
        started = time.time()
        module, _, function = p.step.function.partition(":")
        context = StepContext(config, storage, p, inputs, observer)
        metrics = getattr(importlib.import_module(module), function)(context)
        manifest = {
            "step": name,
            "key": p.key,
            "identity": dict(p.identity),
            "metrics": metrics,
            "artifacts": context.artifacts,
            "created": time.time(),
            "seconds": time.time() - started,
            "host": {"name": platform.node(), "cpus": os.cpu_count()},
            "versions": {"python": platform.python_version(), **_library_versions()},
        }
        if not storage.create(f"{p.directory}/manifest.json", _to_json(manifest)):
            manifest = finished()  # a zombie of an earlier attempt came first
            if manifest is None:
                raise StorageError(
                    f"{storage.uri}/{p.directory}/manifest.json appeared and vanished while the "
                    "step ran. See that nothing else deletes files below the storage root."
                )
        for path in context.scratch:
            storage.delete(path)
        observer(Event("finished", name, {"seconds": manifest["seconds"], "metrics": metrics}))
        return manifest


def _fits(step: Step, running: Any, capacity: Resources) -> bool:
    used = [step.resources, *(p.step.resources for p in running)]
    return sum(r.cpus for r in used) <= max(capacity.cpus, step.resources.cpus) and sum(
        r.gpus for r in used
    ) <= max(capacity.gpus, step.resources.gpus)


def _reason(
    identity: Mapping[str, Any],
    previous: Mapping[str, Any] | None,
    planned: Mapping[str, PlannedStep],
) -> str:
    if previous is None:
        return "it never ran"
    if previous["version"] != identity["version"]:
        return f"its code changed (version {previous['version']} to {identity['version']})"
    changes = []
    for key in sorted({*previous["settings"], *identity["settings"]}):
        old, new = previous["settings"].get(key), identity["settings"].get(key)
        if old != new:
            brief = all(not isinstance(v, dict | list) for v in (old, new))
            how = f" from {old} to {new}" if brief else ""
            if isinstance(old, dict) and isinstance(new, dict):
                how = f" ({_difference(old, new)})"
            changes.append(f"{key} changed{how}")
    for name, key in identity["inputs"].items():
        if previous["inputs"].get(name) != key:
            word = "runs again" if planned[name].action == "run" else "is another"
            changes.append(f"{name} {word}")
    return "; ".join(changes) if changes else "it did not finish"


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    counts = {
        "added": len(new.keys() - old.keys()),
        "changed": sum(old[key] != new[key] for key in old.keys() & new.keys()),
        "removed": len(old.keys() - new.keys()),
    }
    return ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)


def _library_versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
