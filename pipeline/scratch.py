"""A place for a while: a directory and processes that are gone with it, however it ends."""

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster import remove_stale_directories
from pipeline.processes import find_processes

POLL_S = 0.02
GRACE_S = 20.0  # for Ray's processes to end by themselves
MARK = "RAYDIFFUSION_DRILL"


@contextlib.contextmanager
def scratch_place() -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory, and the environment of processes; neither outlives the block."""
    scratch = Path(tempfile.mkdtemp(prefix="rd-"))  # short, for Ray's sockets lie below it
    mark = secrets.token_hex(16)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # A token of its own: none in the home directory is read or made.
    environment |= {MARK: mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))  # torch makes one
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit()) if in_main else None
    try:
        yield scratch, environment
        _await_end(mark, GRACE_S)
    finally:
        _kill_all(mark)
        shutil.rmtree(scratch, ignore_errors=True)
        remove_stale_directories()  # of Ray, when its driver was killed
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _await_end(mark: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while find_processes(mark) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _kill_all(mark: str) -> None:
    """Ends what still runs of a drill that failed or was interrupted."""
    while pids := find_processes(mark):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
