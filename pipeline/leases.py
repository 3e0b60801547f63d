"""Leases: who is working on a run or a step right now.

A lease only saves double work: manifests are create-only, so a late zombie harms nothing.
The holder of directory d is the highest numbered `d/lease-*.json`. A number is created
exclusively, so of two processes that want it one wins; only its owner rewrites it. A holder
that died on this host is replaced at once; one elsewhere when its heartbeat has not moved for
20 s by the waiter's own clock, so that clocks need not agree.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import BusyError, RaydiffusionError
from pipeline.processes import boot_id, process_started
from pipeline.storage import Storage, claim

HEARTBEAT_S = 5.0
LIFE_S = 20.0
POLL_S = 0.5

OnWait = Callable[[dict[str, Any], float], None]


@contextlib.contextmanager
def hold_lease(
    storage: Storage,
    directory: str,
    *,
    wait: bool = True,
    on_wait: OnWait | None = None,
    is_done: Callable[[], bool] = lambda: False,
) -> Iterator[bool]:
    """Holds the lease of a directory while the block runs.

    Args:
        storage: the root.
        directory: whose lease.
        wait: for a holder to finish or die; otherwise leave at once.
        on_wait: called while waiting, with the holder and the seconds left of its lease if it
            no longer beats.
        is_done: asked while waiting; True ends the wait.

    Yields:
        True when the lease is held; False when `is_done` ended the wait.

    Raises:
        BusyError: it is held by another process and `wait` is False.
    """
    number = _acquire(storage, directory, wait, on_wait, is_done)
    if number is None:
        yield False
        return
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(storage, directory, number, stop), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        stop.set()
        heart.join()
        with contextlib.suppress(RaydiffusionError):  # an expired lease is released as well
            storage.replace(_path(directory, number), _document(beats=0, released=True))
            for name in _names(storage, directory)[:-1]:
                storage.delete(f"{directory}/{name}")


@contextlib.contextmanager
def hold_alone(storage: Storage, directory: str, doing: str) -> Iterator[None]:
    """Holds a lease while the block runs, or leaves at once if somebody who lives does.

    Args:
        storage: the root.
        directory: whose lease.
        doing: what the holder does, as in "cleans up here".

    Raises:
        BusyError: somebody does.
    """

    def refuse(holder: dict[str, Any], left_s: float) -> None:
        if read_holder(storage, directory) is not None:
            raise BusyError(
                f"Process {holder['pid']} on {holder['host']} {doing} already. Wait until it has "
                "ended, or end it."
            )

    with hold_lease(storage, directory, on_wait=refuse):
        yield


def read_holder(storage: Storage, directory: str) -> dict[str, Any] | None:
    """The holder of a lease that looks alive, or None. Never waits."""
    names = _names(storage, directory)
    holder = _read(storage, f"{directory}/{names[-1]}") if names else None
    if holder is None or holder["released"] or _is_dead_here(holder):
        return None
    if not _is_here(holder) and time.time() - holder["beat_at"] > LIFE_S:
        return None
    return holder


def await_release(storage: Storage, directory: str) -> bool:
    """Waits while a lease is held, without taking it; whether it was.

    A holder that does not beat for 20 s by the clock here is taken for dead.
    """
    was_held, last_beat, seen_at = False, None, time.monotonic()
    while True:
        names = _names(storage, directory)
        holder = _read(storage, f"{directory}/{names[-1]}") if names else None
        if holder is None or holder["released"] or _is_dead_here(holder):
            return was_held
        beat = (names[-1], holder["beats"], holder["pid"])
        if beat != last_beat:
            last_beat, seen_at = beat, time.monotonic()
        elif time.monotonic() - seen_at > LIFE_S:
            storage.delete(f"{directory}/{names[-1]}")  # the next one need not wait so long
            return was_held
        was_held = True
        time.sleep(POLL_S)


def _acquire(
    storage: Storage,
    directory: str,
    wait: bool,
    on_wait: OnWait | None,
    is_done: Callable[[], bool],
) -> int | None:
    last_beat: tuple[Any, ...] | None = None
    seen_at = time.monotonic()
    while True:
        names = _names(storage, directory)
        number = int(names[-1][6:-5]) if names else 0
        holder = _read(storage, f"{directory}/{names[-1]}") if names else None
        if holder is not None and not holder["released"]:
            beat = (number, holder["beats"], holder["pid"])
            if beat != last_beat:
                last_beat, seen_at = beat, time.monotonic()
            left_s = LIFE_S - (time.monotonic() - seen_at)
            if left_s > 0 and not _is_dead_here(holder):
                if not wait:
                    raise BusyError(
                        f"Process {holder['pid']} on {holder['host']} is working on {directory}. "
                        "Wait for it, or leave out --no-wait to queue behind it."
                    )
                if is_done():
                    return None
                if on_wait is not None:
                    on_wait(holder, left_s)
                time.sleep(POLL_S)
                continue
        mine = _path(directory, number + 1)
        if claim(storage, mine, _document(beats=0)):
            if f"{directory}/{_names(storage, directory)[-1]}" == mine:
                return number + 1
            # The number had come and gone while we looked: a higher one holds.
            storage.delete(mine)


def _beat(storage: Storage, directory: str, number: int, stop: threading.Event) -> None:
    beats = 0
    while not stop.wait(HEARTBEAT_S):
        beats += 1
        with contextlib.suppress(RaydiffusionError):  # storage away: the next beat may pass
            storage.replace(_path(directory, number), _document(beats=beats))


def _names(storage: Storage, directory: str) -> list[str]:
    return [name for name in storage.list(directory) if name.startswith("lease-")]


def _path(directory: str, number: int) -> str:
    return f"{directory}/lease-{number:06d}.json"


def _read(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(path))
    except (FileNotFoundError, json.JSONDecodeError):  # cleaned up since it was listed, or torn
        return None


def _document(*, beats: int, released: bool = False) -> bytes:
    return json.dumps(
        {
            "host": socket.gethostname(),
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()),
            "beats": beats,
            "beat_at": time.time(),
            "released": released,
        }
    ).encode()


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder runs on this host, since its present boot."""
    return (holder["host"], holder["boot_id"]) == (socket.gethostname(), boot_id())


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's process on this host is gone, or its id belongs to another."""
    if not _is_here(holder) or holder["process_started"] is None:
        return False
    return process_started(holder["pid"]) != holder["process_started"]
