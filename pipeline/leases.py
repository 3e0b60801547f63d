"""Leases: who is working on a run or a step right now.

A lease only saves double work: manifests are create-only, so a late zombie harms nothing.
The holder of directory d is the highest numbered `d/lease-*.json`. A number is created
exclusively, so of two processes that want it one wins; only its owner rewrites it. A holder
that died here, in this container of this host, is replaced at once; one elsewhere when its
heartbeat has not moved for 20 s by the waiter's own clock, so that clocks need not agree.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import BusyError, RaydiffusionError
from pipeline.processes import process_place, process_started
from pipeline.storage import STORAGE_THREADS, Storage, claim

HEARTBEAT_S = 5.0
LIFE_S = 20.0
POLL_S = 0.5

OnWait = Callable[[dict[str, Any], float], None]


class Watch:
    """What this process has seen of a lease that it looks at again and again."""

    def __init__(self) -> None:
        self._beat: tuple[Any, ...] | None = None
        self._seen_at = 0.0
        self._has_moved = False

    def look(self, holder: dict[str, Any]) -> float:
        """Takes a look in; the seconds left of the lease if it does not beat again."""
        beat = tuple(holder[name] for name in ("host", "pid", "beats", "beat_at"))
        if beat != self._beat:
            self._has_moved = self._beat is not None
            self._beat, self._seen_at = beat, time.monotonic()
        if _lives_here(holder) is False:
            return 0.0
        return LIFE_S - (time.monotonic() - self._seen_at)

    def is_alive(self, holder: dict[str, Any]) -> bool:
        """Whether the holder is known to live: it is to be seen from here, or has beaten since."""
        return self._has_moved or _lives_here(holder) is True


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
def hold_alone(
    storage: Storage,
    directory: str,
    doing: str,
    *,
    remedy: str = "Wait until it has ended, or end it.",
) -> Iterator[None]:
    """Holds a lease while the block runs, or leaves at once if somebody who lives does.

    Args:
        storage: the root.
        directory: whose lease.
        doing: what the holder does, as in "cleans up here".
        remedy: what to do about one, as a sentence.

    Raises:
        BusyError: somebody does. Of a holder elsewhere that takes two looks, and some seconds.
    """
    watch = Watch()

    def refuse(holder: dict[str, Any], left_s: float) -> None:
        watch.look(holder)
        if watch.is_alive(holder):
            raise BusyError(
                f"Process {holder['pid']} on {holder['host']} {doing} already. {remedy}"
            )

    with hold_lease(storage, directory, on_wait=refuse):
        yield


def read_holder(storage: Storage, directory: str) -> dict[str, Any] | None:
    """The holder of a lease that looks alive, or None. Never waits.

    By the clock, where it cannot be seen from here: for people. What is decided by it asks
    `find_living`.
    """
    _, holder = _look(storage, directory)
    if holder is None or (lives := _lives_here(holder)) is False:
        return None
    if lives is None and time.time() - holder["beat_at"] > LIFE_S:
        return None
    return holder


def find_living(storage: Storage, directories: Iterable[str]) -> set[str]:
    """Those of some directories whose leases are held by who lives, or may.

    Waits up to 20 s, for all together, for another beat of holders that cannot be seen from here
    and whose clock does not agree.

    Args:
        storage: the root.
        directories: whose leases.
    """
    watches, living = {directory: Watch() for directory in directories}, set[str]()
    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        while watches:
            looks = list(pool.map(lambda directory: _look(storage, directory)[1], watches))
            for directory, holder in zip(list(watches), looks, strict=True):
                if holder is None or watches[directory].look(holder) <= 0:
                    del watches[directory]
                elif watches[directory].is_alive(holder) or _beats_by_the_clock(holder):
                    living.add(directory)
                    del watches[directory]
            if watches:
                time.sleep(POLL_S)
    return living


def await_release(storage: Storage, directory: str) -> bool:
    """Waits while a lease is held, without taking it; whether it was.

    A holder that does not beat for 20 s by the clock here is taken for dead.
    """
    was_held, watch = False, Watch()
    while True:
        path, holder = _look(storage, directory)
        if holder is None or _lives_here(holder) is False:
            return was_held
        if watch.look(holder) <= 0:
            storage.delete(path)  # the next one need not wait so long
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
    watch = Watch()
    while True:
        names = _names(storage, directory)
        number = int(names[-1][6:-5]) if names else 0
        holder = _read(storage, f"{directory}/{names[-1]}") if names else None
        left_s = 0.0 if holder is None or holder["released"] else watch.look(holder)
        if holder is not None and left_s > 0:
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


def _look(storage: Storage, directory: str) -> tuple[str, dict[str, Any] | None]:
    """The path of the highest lease, and its holder; None where it is released or none is there."""
    names = _names(storage, directory)
    path = f"{directory}/{names[-1]}" if names else ""
    holder = _read(storage, path) if names else None
    return path, None if holder is None or holder["released"] else holder


def _names(storage: Storage, directory: str) -> list[str]:
    return [name for name in storage.list(directory) if name.startswith("lease-")]


def _path(directory: str, number: int) -> str:
    return f"{directory}/lease-{number:06d}.json"


def _read(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(path))
    except (FileNotFoundError, ValueError):  # cleaned up since it was listed, or torn
        return None


def _document(*, beats: int, released: bool = False) -> bytes:
    return json.dumps(
        {
            "host": socket.gethostname(),
            "place": process_place(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()),
            "beats": beats,
            "beat_at": time.time(),
            "released": released,
        }
    ).encode()


def _lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives; None where that cannot be seen from here.

    Its id may belong to another process by now, and in another container it always does.
    """
    if holder.get("place") != process_place() or holder["process_started"] is None:
        return None
    return process_started(holder["pid"]) == holder["process_started"]


def _beats_by_the_clock(holder: dict[str, Any]) -> bool:
    return abs(time.time() - holder["beat_at"]) <= LIFE_S
