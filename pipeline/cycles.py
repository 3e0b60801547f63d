"""The records of `retrain`: its cycles, and what became of them.

    models/<name>/cycles/000004.json     what a cycle began with; the latest one counts
    models/<name>/outcomes/000004.json   how it ended; missing: it goes on with the next call

All are created once and never changed. `models/<name>/retrain` holds the lease of who is at it. The
cycle itself is in `retrain.py`; what it held is recorded in `holding.py`.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import BusyError
from pipeline.leases import hold_alone
from pipeline.registry import Registry, user
from pipeline.runs import directory_of_cycle


@contextlib.contextmanager
def hold_cycle(registry: Registry) -> Iterator[None]:
    """Keeps others from retraining a model, or pinning for it, while the block runs.

    Raises:
        BusyError: another process does.
    """
    doing = f"retrains {registry.name}, or pins another reference for it,"
    remedy = "Wait for it; the same command then finds what it did."
    with hold_alone(registry.storage, directory_of_cycle(registry.name), doing, remedy=remedy):
        yield


def last_cycle(registry: Registry) -> dict[str, Any] | None:
    """The latest cycle, with its `outcome` or None for one that is not over; None: there is none.

    Args:
        registry: of the model.
    """
    cycles = registry.records("cycles", last=1)
    if not cycles:
        return None
    outcomes = registry.records("outcomes", last=1)  # of this cycle or an earlier one
    ended = {outcome["number"]: outcome for outcome in outcomes}
    return {**cycles[0], "outcome": ended.get(cycles[0]["number"])}


def begin_cycle(registry: Registry, document: Mapping[str, Any]) -> dict[str, Any]:
    """Records what a cycle begins with.

    Args:
        registry: of the model, whose cycle this process holds.
        document: its key, shards, loose files, champion, start and evaluation.

    Raises:
        BusyError: another process began one, its lease being taken for dead.
    """
    full = {**document, "by": user(), "time": time.time()}
    cycle = registry.add_record("cycles", registry.records("cycles", last=1), full)
    if cycle is None:
        raise BusyError(f"{registry.name} is being retrained by another process. Wait for it.")
    return cycle


def end_cycle(registry: Registry, number: int, outcome: Mapping[str, Any]) -> None:
    """Records how a cycle ended; what is recorded already stays.

    Args:
        registry: of the model.
        number: of the cycle.
        outcome: its state, version, reason, run, and the shards that were held.
    """
    full = {"number": number, **outcome, "by": user(), "time": time.time()}
    registry.create("outcomes", f"{number:06d}", full)
