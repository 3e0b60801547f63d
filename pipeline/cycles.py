"""The records of `retrain`: its cycles, and what became of them.

    models/<name>/cycles/000004.json     what a cycle began with; the latest one counts
    models/<name>/outcomes/000004.json   how it ended; missing: it goes on with the next call

All are created once and never changed. The cycle itself is in `retrain.py`; what it held is
recorded in `holding.py`.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import BusyError
from pipeline.leases import hold_lease, read_holder
from pipeline.registry import Registry, user


@contextlib.contextmanager
def hold_cycle(registry: Registry) -> Iterator[None]:
    """Keeps others from retraining a model, or pinning for it, while the block runs.

    Raises:
        BusyError: another process does.
    """
    directory = f"models/{registry.name}/retrain"

    def is_alive() -> bool:  # one that died on another machine is waited out
        return read_holder(registry.storage, directory) is not None

    with hold_lease(registry.storage, directory, is_done=is_alive) as is_ours:
        if not is_ours:
            holder = read_holder(registry.storage, directory)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise BusyError(
                f"{registry.name} is being retrained, or gets another reference, by {who}. Wait "
                "for it; the same command then finds what it did."
            )
        yield


def last_cycle(registry: Registry) -> dict[str, Any] | None:
    """The latest cycle, with its `outcome` or None for one that is not over; None: there is none.

    Args:
        registry: of the model.
    """
    cycles = registry.records("cycles")
    if not cycles:
        return None
    ended = {outcome["number"]: outcome for outcome in registry.records("outcomes")}
    return {**cycles[-1], "outcome": ended.get(cycles[-1]["number"])}


def begin_cycle(registry: Registry, document: Mapping[str, Any]) -> dict[str, Any]:
    """Records what a cycle begins with.

    Args:
        registry: of the model, whose cycle this process holds.
        document: its key, shards, champion, start and evaluation.

    Raises:
        BusyError: another process began one, its lease being taken for dead.
    """
    full = {**document, "by": user(), "time": time.time()}
    cycle = registry.add_record("cycles", registry.records("cycles"), full)
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
