"""What the benchmarks share: running a command and watching its processes, and naming the machine.

Memory is read from /proc, so Linux only.
"""

import json
import os
import platform
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SAMPLED_EVERY_S = 0.1


def measure(command: list[str], directory: str) -> dict[str, Any]:
    """Runs a command; its wall time, its JSON, and the peak memory of its descendants."""
    started, clock = time.time(), time.monotonic()
    peak_kib: dict[str, int] = {}
    object_store = 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command, cwd=directory, stdout=printed, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            for name, kib in descendants_kib(process.pid):
                peak_kib[name] = max(peak_kib.get(name, 0), kib)
            object_store = max(object_store, object_store_bytes(process.pid))
            time.sleep(SAMPLED_EVERY_S)
        wall_s = time.monotonic() - clock
        printed.seek(0)
        outcome = json.load(printed)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {outcome}")
    return {
        "started": started,
        "wall_s": wall_s,
        "outcome": outcome,
        "peak_kib": peak_kib,
        "object_store_bytes": object_store,
    }


def descendants(root: int) -> set[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone since it was listed
            parents[int(entry.name)] = int(stat[1])
    family = {root}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def descendants_kib(root: int) -> list[tuple[str, int]]:
    """(name and id, VmHWM in KiB) of a process and all below it."""
    found = []
    for pid in descendants(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        peak = [row.split()[1] for row in status.splitlines() if row.startswith("VmHWM")]
        arguments = [argument for argument in line if argument]
        if peak and arguments:  # none while a process gives itself another name
            found.append((f"{Path(arguments[-1].decode()).name} {pid}", int(peak[0])))
    return found


def object_store_bytes(root: int) -> int:
    """Memory that Ray's object store below a process has ever touched; its file has no name."""
    for pid in descendants(root):
        try:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                if "/plasma" in str(entry.readlink()):
                    return entry.stat().st_blocks * 512
        except OSError:
            continue  # gone since it was listed
    return 0


def largest(peak_kib: dict[str, int], count: int = 8) -> dict[str, int]:
    """The largest processes by peak memory in MiB."""
    ordered = sorted(peak_kib.items(), key=lambda item: -item[1])[:count]
    return {name[:60]: kib // 1024 for name, kib in ordered}


def hardware() -> dict[str, Any]:
    """The machine a result was measured on."""
    return {"cpu": cpu_model(), "cpus": os.cpu_count()}


def versions(*names: str) -> dict[str, str]:
    """Of Python and the libraries that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def cpu_model() -> str:
    """The processor's name as Linux knows it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
