"""Deletes what nothing needs any more, however far an earlier attempt came.

What is needed is found by `reachable.py`. Of the rest, what was written within the grace period
stays, and what somebody works on. A manifest goes before what it names, so that a kill leaves no
manifest without its files, and the same command finishes the work. A run that starts meanwhile
waits: it writes its record first and then looks whether a clean-up is under way, which takes its
lease first and then reads the records. So does a cycle of `retrain` that works beside runs.
"""

import contextlib
import errno
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError, StorageError
from pipeline.leases import LIFE_S, find_living, hold_alone
from pipeline.reachable import find_reached
from pipeline.runs import SWEEP
from pipeline.steps import STEP_NAMES
from pipeline.storage import STALE_S, Storage, StoredFile, open_storage

KEEP_RUNS = 10
WATCH_EVERY_S = 1.0
GRACE_S = 7 * 86_400.0
# How many names of a path make one unit, which is deleted as a whole; nothing else is touched.
UNITS = {"steps": 3, "features": 3, "runs": 2, "models-elsewhere": 2, "probes": 2}
# Only what has a name that we give is ours: the directory may hold what other programs wrote.
_KEY, _LEASE = "[0-9a-f]{32}", r"lease-\d{6}\.json"
_STEPS = "|".join((*STEP_NAMES, "images", "shard", "trial", "tune"))
_UNIT = re.compile(
    rf"steps/({_STEPS})/{_KEY}|features/{_KEY}/([0-9a-f]{{64}}\.|\.staged-).*|runs/.*"
    rf"|(models-elsewhere|probes)/{_KEY}"
)
# A run that was killed before its record was there, or while it was being deleted.
_BROKEN_RUN = re.compile(
    rf"runs/[^/]+-[0-9a-f]{{8}}/({_LEASE}|\.staged-.*|events\.jsonl|report\.html"
    r"|tune\.(json|html)|trials\.csv)"
)
_TOPS = ("runs", "steps", "models")
_RECORDS = "versions|promotions|evaluations|cycles|outcomes"
_EVIDENCE = re.compile(
    rf"runs/[^/]+/run\.json|runs/[^/]+-[0-9a-f]{{8}}/{_LEASE}|steps/({_STEPS})/{_KEY}/.*"
    rf"|models/[^/]+/(({_RECORDS})/\d{{6}}\.json|retrain/{_LEASE})|{SWEEP}/{_LEASE}"
)
# Below a result that is there, what was of use only while it was made.
SCRATCH = ("chunks", "ray", "verdicts")
NAMES_OTHERS = ("manifest.json", "run.json", "model.json")  # go first


@dataclass(frozen=True)
class Unit:
    """Files that stay or go together.

    Args:
        path: of the file or directory, below the root.
        kind: `steps/train`, `runs`, ..., for a summary.
        num_bytes: of all files.
        modified: when the newest was written; None where the storage does not tell.
        first: the paths that are deleted before the rest.
        has_lease: whether there are leases among the files.
    """

    path: str
    kind: str
    num_bytes: int
    modified: float | None
    first: tuple[str, ...] = ()
    has_lease: bool = False


@dataclass(frozen=True)
class Survey:
    """What there is below a root.

    Args:
        garbage: what nothing reaches and is old enough to go.
        reached: what must stay.
        young: what nothing reaches, but is too new, or worked on.
        runs: names of the runs whose records stay.
    """

    garbage: list[Unit]
    reached: list[Unit]
    young: list[Unit]
    runs: list[str]


def check_root(storage: Storage) -> None:
    """Proves that a storage root of ours is there, and not one directory below.

    Raises:
        ConfigError: it is not.
    """
    holds_ours = _holds_ours(storage, _TOPS)
    # The features of a root at ./steps look like results of ours.
    for name in ("steps",) if holds_ours else _TOPS:
        inner = open_storage(f"{storage.uri}/{name}")
        if _holds_ours(inner, _TOPS):
            raise ConfigError(
                f"The storage root is not {storage.uri}, but its directory {name}. Give "
                f"{inner.uri}."
            )
    if not holds_ours and not _holds_ours(storage, (SWEEP,)):
        raise ConfigError(
            f"There is no storage root at {storage.uri}: it holds neither runs nor steps nor "
            "models of ours. Give the directory or URI that storage.root names, or a config."
        )


def _holds_ours(storage: Storage, directories: Sequence[str]) -> bool:
    files = (file for name in directories for file in storage.files(name))
    return any(_EVIDENCE.fullmatch(file.path) for file in files)


def collect_garbage(
    storage: Storage,
    *,
    keep_runs: int = KEEP_RUNS,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    on_delete: Callable[[Unit], None] = lambda unit: None,
) -> Survey:
    """Deletes what no run, model version, pinned evaluation, search or lease reaches.

    Args:
        storage: the root.
        keep_runs: of each model name, the latest so many runs stay, however old.
        grace_s: what was written within so many seconds stays; so do runs that went on then.
        dry_run: whether only to look.
        on_delete: told each unit when it is gone.

    Raises:
        BusyError: another process cleans up here.
        ConfigError: there is no storage root.
        StorageError: a record cannot be read, or something cannot be deleted.
    """
    check_root(storage)
    since = time.time() - grace_s
    if dry_run:
        return _survey(storage, keep_runs, since)
    with _alone(storage) as check:
        survey = _survey(storage, keep_runs, since)
        for unit in survey.garbage:
            check()
            for path in unit.first:
                storage.delete(path)
            storage.delete(unit.path)
            on_delete(unit)
        return survey


@contextlib.contextmanager
def _alone(storage: Storage) -> Iterator[Callable[[], None]]:
    """One clean-up at a time; what is yielded raises if the lease may have been lost."""
    times, longest, stop = [time.time()], [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(WATCH_EVERY_S):
            now = time.time()  # once: a pause between two looks at the clock would be in neither
            longest[0], times[0] = max(longest[0], now - times[0]), now

    def check() -> None:
        # Whoever was stopped for a while, as a laptop that sleeps, did not renew its lease.
        if max(longest[0], time.time() - times[0]) > LIFE_S / 2:
            raise StorageError(
                f"The clean-up of {storage.uri} was held up, and a run may have started "
                "meanwhile. Run it again: it goes on."
            )

    watcher = threading.Thread(target=watch, daemon=True)
    with _hold(storage):
        watcher.start()
        try:
            yield check
        finally:
            stop.set()
            watcher.join()


@contextlib.contextmanager
def _hold(storage: Storage) -> Iterator[None]:
    """The lease of the clean-up; where the disk is too full for it, room is made first."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_alone(storage, SWEEP, f"cleans up {storage.uri}"))
        except StorageError as error:
            if not _is_full(error):
                raise
            # These are no part of anything, so that no lease is needed.
            staged = [file.path for top in UNITS for file in storage.files(top) if file.is_staged]
            for directory in sorted({path.rpartition("/")[0] for path in staged}):
                storage.clean(directory)
            try:
                stack.enter_context(hold_alone(storage, SWEEP, f"cleans up {storage.uri}"))
            except StorageError as again:
                if not _is_full(again):
                    raise
                raise StorageError(
                    f"There is no space left at {storage.uri}, not even for the lease of the "
                    "clean-up. Free some KiB there by hand, and run it again."
                ) from again
        yield


def _is_full(error: StorageError) -> bool:
    return getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _survey(storage: Storage, keep_runs: int, since: float) -> Survey:
    groups = dict(sorted(_group(storage)))
    units = {path: _unit(path, files) for path, files in groups.items()}
    written = {path: unit.modified for path, unit in units.items()}
    reached = find_reached(storage, written, keep_runs=keep_runs, since=since)
    survey, rest = Survey([], [], [], reached.runs), list[tuple[Unit, Unit]]()
    for path, unit in units.items():
        if reached.holds(path):
            files = groups[path]
            leftovers = list(_leftovers(path, files))
            gone = {file.path for _, of_it in leftovers for file in of_it}
            survey.reached.append(_unit(path, [file for file in files if file.path not in gone]))
            for below, of_it in leftovers:
                rest.append((_unit(below, of_it), unit))
        else:
            rest.append((unit, unit))
    old = [unit.modified is not None and unit.modified < since for unit, _ in rest]
    leased = {o.path for (_, o), is_old in zip(rest, old, strict=True) if is_old and o.has_lease}
    living = find_living(storage, leased)
    for (unit, owner), is_old in zip(rest, old, strict=True):
        (survey.garbage if is_old and owner.path not in living else survey.young).append(unit)
    return survey


def _group(storage: Storage) -> Iterator[tuple[str, list[StoredFile]]]:
    """The files of each unit."""
    for top, depth in UNITS.items():
        groups: dict[str, list[StoredFile]] = {}
        for file in storage.files(top):
            parts = file.path.split("/")
            if len(parts) >= depth and _UNIT.fullmatch(unit := "/".join(parts[:depth])):
                groups.setdefault(unit, []).append(file)
        yield from (it for it in groups.items() if top != "runs" or _is_run(*it))


def _is_run(path: str, files: Sequence[StoredFile]) -> bool:
    names = [file.path for file in files]
    return f"{path}/run.json" in names or all(map(_BROKEN_RUN.fullmatch, names))


def _leftovers(path: str, files: Sequence[StoredFile]) -> Iterator[tuple[str, list[StoredFile]]]:
    """What killed processes left in a directory that stays."""
    is_done = any(file.path == f"{path}/manifest.json" for file in files)
    of_no_use = (*SCRATCH, "checkpoints") if path.startswith("steps/trial/") else SCRATCH
    scratch: dict[str, list[StoredFile]] = {}
    for file in files:
        name = file.path.removeprefix(f"{path}/").partition("/")[0]
        if is_done and name in of_no_use:
            scratch.setdefault(f"{path}/{name}", []).append(file)
        elif file.is_staged and time.time() - (file.modified or time.time()) > STALE_S:
            scratch[file.path] = [file]
    yield from scratch.items()


def _unit(path: str, files: list[StoredFile]) -> Unit:
    parts = path.split("/")
    kind = "/".join(parts[:2]) if parts[0] == "steps" else parts[0]
    if len(parts) > UNITS[parts[0]]:
        kind = "left by kills"
    times = [file.modified for file in files]
    names = {file.path: file.path.rpartition("/")[2] for file in files}
    return Unit(
        path,
        kind,
        num_bytes=sum(file.num_bytes for file in files),
        modified=None if None in times else max((t for t in times if t is not None), default=None),
        first=tuple(p for p, name in names.items() if name in NAMES_OTHERS and p != path),
        has_lease=any(name.startswith("lease-") for name in names.values()),
    )
