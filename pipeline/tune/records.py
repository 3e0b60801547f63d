"""What is kept of an experiment, so that the same command continues it after any kill.

    steps/tune/<experiment>/trials/<name>/proposal.json   before a trial starts
    steps/tune/<experiment>/trials/<name>/result.json     when it has ended, whichever way
    steps/trial/<trial>/rungs/<step>.json                 a score on the way, by the trial itself
    steps/trial/<trial>/samples/<step>.safetensors        a few samples of the same network
    steps/trial/<trial>/checkpoints/                      while it may go on
    steps/trial/<trial>/manifest.json                     once it was trained to its end

    steps/tune/<experiment>/protocol.json                 of all its scores, before the first trial
    steps/tune/<experiment>/exhausted.json                once its space held nothing new

All are created once. A trial is keyed by its resolved config, its data and the protocol of its
score, so that another experiment which comes by the same trial finds it. Checkpoints are deleted
when a trial has ended, so that there are never more than those of the trials that run.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.errors import BusyError
from pipeline.leases import hold_alone, hold_lease
from pipeline.storage import STORAGE_THREADS, Storage

SEED = "-seed"  # in the names of a finalist's trainings
OF_RUNNING = ("checkpoints", "verdicts", "ray")  # below a trial while it may go on
Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Entry:
    """A trial of an experiment, before it runs; JSON.

    Args:
        name: within the experiment: `0003`, or `0003-seed1` of a finalist.
        number: of the proposal; 0 is the config as it is.
        choice: by name of the parameter.
        overrides: the same, as `--set` takes it.
        key: of the trial.
        refused: what was drawn before it and refused, counted by reason.
    """

    name: str
    number: int
    choice: Mapping[str, Any]
    overrides: Sequence[str]
    key: str
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_seeded(self) -> bool:
        """Whether it is a finalist's training with another seed."""
        return SEED in self.name

    @property
    def directory(self) -> str:
        """Of the trial, below the root."""
        return f"steps/trial/{self.key}"


@dataclass(frozen=True)
class Rung:
    """A score of a trial on its way; JSON.

    Args:
        step: optimiser steps done.
        images_seen: by then.
        value: of the score; lower is better.
        train_s: seconds of training since the rung before; where a kill came between, since it was
            resumed, without what led to the checkpoint.
        score_s: seconds that the score took.
    """

    step: int
    images_seen: int
    value: float
    train_s: float
    score_s: float


@dataclass(frozen=True)
class Result:
    """What came of a trial; JSON.

    Args:
        outcome: trained to its end, ended early as it fell behind, or failed.
        rungs: its scores, by steps; the last is that of the whole trial if it finished.
        seconds: from its start to its end, of the last attempt.
        reason: of a failure.
    """

    outcome: Outcome
    rungs: Sequence[Rung]
    seconds: float
    reason: str = ""

    @property
    def value(self) -> float | None:
        """The score of a trial that finished."""
        return self.rungs[-1].value if self.outcome == "finished" else None

    @property
    def by_images(self) -> dict[int, float]:
        """The scores by images seen; none of a failed trial."""
        if self.outcome == "failed":
            return {}
        return {rung.images_seen: rung.value for rung in self.rungs}


class Records:
    """The records of one experiment.

    Args:
        storage: the root.
        directory: of the step `tune`, below the root.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self.storage, self.directory = storage, f"{directory}/trials"
        self._protocol = f"{directory}/protocol.json"
        self._exhaustion = f"{directory}/exhausted.json"
        self._ended: dict[str, Entry] = {}  # whose checkpoints may still be there

    def keep_protocol(self, protocol: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keeps the protocol of the scores; returns that of the first attempt."""
        self.storage.create(self._protocol, json.dumps(protocol).encode())
        return self._read(self._protocol) or protocol

    def keep_exhaustion(
        self, num_trials: int, asked_for: int, refused: Mapping[str, int]
    ) -> dict[str, Any]:
        """Keeps that the space held nothing new; returns what `exhaustion` will.

        Args:
            num_trials: that there are, the config as it is counted.
            asked_for: trials.
            refused: what was drawn in vain, counted by reason.
        """
        found = {"num_trials": num_trials, "asked_for": asked_for, "refused": refused}
        self.storage.create(self._exhaustion, json.dumps(found).encode())
        return found

    def exhaustion(self) -> dict[str, Any] | None:
        """What was kept by `keep_exhaustion`; None where the space may hold more."""
        return self._read(self._exhaustion)

    def add(self, entry: Entry) -> None:
        """Keeps a proposal, before its trial starts."""
        path = f"{self.directory}/{entry.name}/proposal.json"
        self.storage.create(path, json.dumps(asdict(entry)).encode())

    def end(self, entry: Entry, result: Result) -> None:
        """Keeps what came of a trial, and lets its checkpoints go."""
        path = f"{self.directory}/{entry.name}/result.json"
        self.storage.create(path, json.dumps(asdict(result)).encode())
        self._ended[entry.name] = entry
        self.drop_checkpoints(self._ended.values())

    def forget(self, entry: Entry) -> None:
        """Lets a trial be tried again as if it had not ended."""
        self.storage.delete(f"{self.directory}/{entry.name}/result.json")

    def drop_checkpoints(self, entries: Iterable[Entry], *, is_last: bool = False) -> None:
        """Deletes what ended trials would have continued from.

        Not while someone is at it: a stopped trial's thread may end a little later, and the same
        trial of another experiment goes on. Such a one is tried again when the next trial ends.

        Args:
            entries: of the trials.
            is_last: no other attempt follows: where a trial's process died on another node, its
                lease is waited for, some 20 s, for all together.
        """

        def drop(entry: Entry) -> None:
            held = (
                hold_alone(self.storage, entry.directory, "trains")
                if is_last
                else hold_lease(self.storage, entry.directory, wait=False)
            )
            with contextlib.suppress(BusyError), held:
                for name in OF_RUNNING:
                    self.storage.delete(f"{entry.directory}/{name}")
                self._ended.pop(entry.name, None)

        with ThreadPoolExecutor(STORAGE_THREADS) as pool:
            list(pool.map(drop, list(entries)))

    def entries(self) -> list[Entry]:
        """All that were proposed, by name."""
        found = [
            self._read(f"{self.directory}/{name}/proposal.json")
            for name in self.storage.list(self.directory)
        ]
        return [Entry(**document) for document in found if document is not None]

    def result(self, entry: Entry) -> Result | None:
        """What came of a trial; None while it has not ended."""
        document = self._read(f"{self.directory}/{entry.name}/result.json")
        if document is None:
            return None
        rungs = [Rung(**rung) for rung in document.pop("rungs")]
        return Result(**document, rungs=rungs)

    def results(self) -> dict[str, Result]:
        """Of all that have ended, by name."""
        found = {entry.name: self.result(entry) for entry in self.entries()}
        return {name: result for name, result in found.items() if result is not None}

    def _read(self, path: str) -> dict[str, Any] | None:
        return read_json(self.storage, path)


class TrialStore:
    """What a trial keeps of itself.

    Args:
        storage: the root.
        directory: of the trial, below the root.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self.storage, self.directory = storage, directory

    def rungs(self) -> list[Rung]:
        """The scores that were made, by steps."""
        names = self.storage.list(f"{self.directory}/rungs")
        found = [read_json(self.storage, f"{self.directory}/rungs/{name}") for name in names]
        return [Rung(**document) for document in found if document is not None]

    def add_rung(self, rung: Rung, samples: bytes) -> None:
        """Keeps a score, and samples of the network first."""
        path = f"{self.directory}/samples/{rung.step:09d}.safetensors"
        self.storage.create(path, samples)
        path = f"{self.directory}/rungs/{rung.step:09d}.json"
        self.storage.create(path, json.dumps(asdict(rung)).encode())

    def read_samples(self, step: int) -> bytes | None:
        """Those of a score; None where it has none."""
        try:
            return self.storage.read(f"{self.directory}/samples/{step:09d}.safetensors")
        except FileNotFoundError:
            return None

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.storage.exists(f"{self.directory}/manifest.json")

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Says that it was trained to its end: the last thing to be written."""
        path = f"{self.directory}/manifest.json"
        self.storage.create(path, json.dumps(manifest, indent=1).encode())


def read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    """A JSON object of the storage root; None where there is none."""
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        return None
