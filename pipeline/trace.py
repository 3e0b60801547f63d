"""A trace of a training: which processes train, and each row of metrics when it was made.

For drills on one machine: `RAYDIFFUSION_TRACE` names a local file, and ranks append JSON lines to
it. Nothing is buffered, so that what was done before a SIGKILL can be read after it.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "RAYDIFFUSION_TRACE"

OnRow = Callable[[dict[str, Any], int], None]


def trace_rank(path: str, on_row: OnRow, *, rank: int, world_size: int) -> OnRow:
    """Says that a rank begins, and returns a hook that also says each row.

    Args:
        path: of the trace.
        on_row: the hook that there is.
        rank: of this process.
        world_size: number of processes.
    """
    who = {"rank": rank, "world_size": world_size, "pid": os.getpid()}
    _append(path, {"kind": "began", **who})

    def on_traced_row(row: dict[str, Any], first_step: int) -> None:
        on_row(row, first_step)
        steps = {"global_step": row["global_step"], "first_step": first_step}
        _append(path, {"kind": "row", **who, **steps})

    return on_traced_row


class TraceReader:
    """Reads a trace while it is written; `began` and `rows` are what there is so far.

    Args:
        path: of the trace, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.began: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def read(self) -> None:
        """Takes in the lines that are new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            (self.rows if entry["kind"] == "row" else self.began).append(entry)


def _append(path: str, entry: dict[str, Any]) -> None:
    line = json.dumps({"at": time.time(), **entry}).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)  # whole lines, however many processes append
    finally:
        os.close(descriptor)
