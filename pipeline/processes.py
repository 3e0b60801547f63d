"""Processes of this host: which one this is, and whether another one still runs."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path


def boot_id() -> str | None:
    """What is new with each boot of this host; None where that is not to be had."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return None


def process_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_process_alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@cache
def process_place() -> str:
    """This host, its boot and the container in one word: where an id means the same process."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    text = f"{socket.gethostname()} {boot_id()} {namespace}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def process_tag() -> str:
    """A name for this process, to be put into the names of files that only it writes."""
    return f"{process_place()}-{os.getpid()}-{process_started(os.getpid()) or 0}"


def is_tag_dead(tag: str) -> bool | None:
    """Whether the process of a tag is gone; None where that cannot be seen from here."""
    place, _, process = tag.partition("-")
    pid, _, started = process.partition("-")
    if place != process_place() or not (pid.isdigit() and started.isdigit()) or started == "0":
        return None
    return process_started(int(pid)) != int(started)


def find_processes(mark: str) -> list[int]:
    """The other processes of this host that have a text in their environment; on Linux alone."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return [pid for pid in found if pid != os.getpid()]
