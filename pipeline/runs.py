"""The record of a run: which steps, cached or run, why, how long; read by `status`.

A run is a config with its data: the same config over the same shards is the same run, however
often it is started. Its directory `runs/<name>-<8 hex>` holds `run.json`, `events.jsonl` and
`report.html`; all three are written by the holder of the run's lease alone.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError, StorageError
from pipeline.leases import await_release, read_holder
from pipeline.settings import Config
from pipeline.storage import Storage, damaged
from pipeline.workflow import Event, PlannedStep

logger = logging.getLogger(__name__)
_FIELDS = {"name", "identities", "executions"}  # of a record, at least
SWEEP = "garbage"  # whose lease `garbage.py` holds while it deletes
NEEDS = "needs.json"


def run_id(config: Config, planned: Sequence[PlannedStep]) -> str:
    """The name of the run that this config and these shards make."""
    return f"{config.name}-{planned[-1].key[:8]}"


def directory_of_cycle(model: str) -> str:
    """Whose lease is held by who retrains a model, or pins another evaluation for it."""
    return f"models/{model}/retrain"


def record_needs(storage: Storage, model: str, planned: Sequence[PlannedStep]) -> bool:
    """Tells clean-ups what a cycle needs for work that has no run; as long as its lease is held.

    Args:
        storage: the root.
        model: whose cycle this process holds.
        planned: the steps of the work.

    Returns:
        Whether a clean-up that had begun was waited for, which may have deleted some of it.
    """
    path = f"{directory_of_cycle(model)}/{NEEDS}"
    storage.replace(path, json.dumps(_describe_needs(planned)).encode())
    return await_release(storage, SWEEP)


def read_needs(storage: Storage, model: str) -> dict[str, Any] | None:
    """What a cycle of a model has told that it needs, or None."""
    return _read_json(storage, f"{directory_of_cycle(model)}/{NEEDS}")


class RunRecord:
    """Writes a run's record while it goes on. One writer: the holder of the run's lease."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        config: Config,
        planned: Sequence[PlannedStep],
        command: str = "",
    ) -> None:
        self.storage, self.directory = storage, f"runs/{run}"
        self._lock = threading.Lock()  # steps that run side by side report from threads
        before = read_record(storage, run) or {
            "identities": {},
            "directories": {},
            "executions": [],
        }
        for execution in before["executions"]:
            if execution["outcome"] == "running":  # its lease is ours now
                execution["outcome"] = "killed"
        self._events = _read_text(storage, f"{self.directory}/events.jsonl")
        needs = _describe_needs(planned)
        self.document: dict[str, Any] = {
            "run": run,
            "name": config.name,
            "command": command,
            "config": config.model_dump(mode="json"),
            # A verb for one step plans a part; what was known of the others stays.
            "identities": before["identities"] | needs["identities"],
            "directories": before["directories"] | needs["directories"],
            "executions": before["executions"],
        }
        self._execution: dict[str, Any] = {
            "started": time.time(),
            "ended": None,
            "outcome": "running",
            "steps": {
                p.step.name: {"state": "planned", "action": p.action, "reason": p.reason}
                for p in planned
            },
        }
        self.document["executions"].append(self._execution)
        self._write()
        # A clean-up that began before this was written does not know what the run needs. One that
        # begins later does, and spares it.
        self.has_waited = await_release(storage, SWEEP)

    def plan_again(self, planned: Sequence[PlannedStep]) -> None:
        """Takes over what a step on the way has decided about those after it."""
        with self._lock:
            for p in planned:
                name = p.step.name
                self.document["identities"][name] = dict(p.identity)
                self.document["directories"][name] = p.series_directory
                if self._execution["steps"].get(name, {}).get("state", "planned") == "planned":
                    self._execution["steps"][name] = {
                        "state": "planned", "action": p.action, "reason": p.reason
                    }  # fmt: skip
            self._write()
        await_release(self.storage, SWEEP)

    def observe(self, event: Event) -> None:
        """Takes an event of the workflow into the record."""
        if event.kind in ("progress", "waiting"):
            return  # for the screen; a live training also keeps `progress.json`
        with self._lock:
            if event.kind != "note":
                step = self._execution["steps"][event.step]
                step["state"] = event.kind
                step |= {k: v for k, v in event.fields.items() if k in ("seconds", "error")}
            line = {"time": time.time(), "event": event.kind, "step": event.step, **event.fields}
            self._events += json.dumps(line) + "\n"
            # A note must not end what it is about; the next write brings it.
            is_note = event.kind == "note"
            with contextlib.suppress(StorageError) if is_note else contextlib.nullcontext():
                self._write()

    def close(self, outcome: str) -> None:
        """Ends this execution: `done`, `failed` or `interrupted`."""
        with self._lock:
            self._execution |= {"ended": time.time(), "outcome": outcome}
            self._write()

    def _write(self) -> None:
        self.storage.replace(f"{self.directory}/events.jsonl", self._events.encode())
        self.storage.replace(
            f"{self.directory}/run.json", json.dumps(self.document, indent=1).encode()
        )


def _describe_needs(planned: Sequence[PlannedStep]) -> dict[str, dict[str, Any]]:
    """What clean-ups find the results of steps by, and what is begun of them."""
    return {
        "identities": {p.step.name: dict(p.identity) for p in planned},
        "directories": {p.step.name: p.series_directory for p in planned},
    }


def read_run(storage: Storage, run: str) -> dict[str, Any]:
    """A run's record, with `live`: the holder of its lease if one is at work.

    Raises:
        ConfigError: there is no such run.
        StorageError: its record is damaged.
    """
    document = read_record(storage, run)
    if document is None:
        known = ", ".join(list_runs(storage)[-5:]) or "none"
        raise ConfigError(
            f"There is no run {run!r} below {storage.uri}. The latest there: {known}."
        )
    holder = read_holder(storage, f"runs/{run}")
    document["live"] = holder
    last = document["executions"][-1]
    if holder is None and last["outcome"] == "running":
        last["outcome"] = "killed"
    return document


def list_runs(storage: Storage) -> list[str]:
    """All runs below the root, the latest started last; one that is damaged is said, and left out.

    That one must not end the verbs of all others.
    """
    found = []
    for run in storage.list("runs"):
        try:
            document = read_record(storage, run)
        except StorageError as error:
            if storage.exists(f"runs/{run}/run.json"):  # otherwise the storage itself is away
                logger.warning("A run is passed over: %s", error)
                continue
            raise
        if document is not None:
            found.append((document["executions"][-1]["started"], run))
    return [run for _, run in sorted(found)]


def last_identities(storage: Storage, name: str, steps: Sequence[str]) -> Mapping[str, Any] | None:
    """What determined each step in the latest run of this name, or None.

    Not of one that evaluated something else, images or a model made elsewhere in place of the
    training, or the training in place of these: what differs there is no change of a setting.

    Args:
        storage: the root.
        name: of the config.
        steps: those that are planned.
    """
    for run in reversed(list_runs(storage)):
        document = read_record(storage, run)
        if document is not None and document["name"] == name:
            known = document["identities"]
            if "evaluate" not in known or _subject(known) == _subject(steps):
                return known
    return None


def _subject(steps: Iterable[str]) -> set[str]:
    """The steps that say what is evaluated; none of a model made elsewhere."""
    return {"train", "images"} & set(steps)


def read_record(storage: Storage, run: str) -> dict[str, Any] | None:
    """A run's record as it was written, or None.

    Raises:
        StorageError: it is damaged.
    """
    path = f"runs/{run}/run.json"
    document = _read_json(storage, path)
    if document is not None and not (document.keys() >= _FIELDS and document["executions"]):
        raise damaged(storage, path)
    return document


def read_progress(storage: Storage, document: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the training of a live run is, or None."""
    if not document["live"] or "train" not in document["directories"]:
        return None
    with contextlib.suppress(StorageError):  # the next one is written soon
        return _read_json(storage, f"{document['directories']['train']}/progress.json")


def _read_text(storage: Storage, path: str) -> str:
    try:
        return storage.read(path).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        document = json.loads(storage.read(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(storage, path) from error
    if not isinstance(document, dict):
        raise damaged(storage, path)
    return document
