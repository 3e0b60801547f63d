"""The verb `cron`: runs another verb on a cron expression, in a process of its own each time."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from jobs.exit_codes import INTERRUPTED_EXIT_CODE, errors_to_exit_codes
from jobs.options import ConfigPath, Overrides
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.storage import open_storage
from pipeline.timetable import Kind, keep_timetable, parse_timetable

VERBS = ("retrain", "run", "preprocess", "train", "tune", "evaluate", "report")
HOME = Path(__file__).resolve().parent.parent  # of our packages
INSTALLED = ("site-packages", "dist-packages")  # where Python looks anyway

app = typer.Typer()


@app.command()
def cron(
    config: ConfigPath,
    at: Annotated[
        str, typer.Option(metavar="EXPRESSION", help="minute hour day month weekday, as in cron")
    ],
    timezone: Annotated[
        str | None, typer.Option(help="as Europe/Berlin; that of this machine if left out")
    ] = None,
    once_now: Annotated[
        bool, typer.Option("--once-now", help="do not wait for the first time")
    ] = False,
    verb: Annotated[str, typer.Option(help=f"one of {', '.join(VERBS)}")] = VERBS[0],
    set_: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object a line, for each event")
    ] = False,
) -> None:
    """Run a verb on a schedule, until SIGTERM or Ctrl-C; one process for each model name."""
    with errors_to_exit_codes(as_json):
        if verb not in VERBS:
            raise ConfigError(f"cron takes one of {', '.join(VERBS)}, got {verb!r}. Choose one.")
        loaded = load_config(config, set_ or ())
        timetable = parse_timetable(at, timezone, time.time())
        overrides = [part for text in set_ or () for part in ("--set", text)]
        runner = Runner([verb, str(config), *overrides], quiet=as_json)
        printer = Printer(timetable.zone, f"{verb} {config}", as_json)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, runner.on_signal)
        keep_timetable(
            open_storage(loaded.storage.root),
            loaded.name,
            timetable,
            runner.run,
            wait=runner.wait,
            now=time.time,
            say=printer.say,
            once_now=once_now,
        )
        if runner.signal == signal.SIGINT:
            raise typer.Exit(INTERRUPTED_EXIT_CODE)


class Runner:
    """Runs the verb, and passes on the signal that ends us.

    Args:
        arguments: of `raydiffusion`.
        quiet: whether what is printed goes to the standard error.
    """

    def __init__(self, arguments: Sequence[str], *, quiet: bool) -> None:
        self.signal: int | None = None
        # A lock of `threading` may be held by the very code that a handler interrupts.
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._arguments, self._quiet = list(arguments), quiet
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Runs it to its end; the exit code, negative where a signal killed it."""
        # The same packages as ours, whatever lies in the working directory.
        home = "" if HOME.name in INSTALLED else str(HOME)
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "jobs", *self._arguments],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if self._quiet else None,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
        if self.signal is not None:  # it came while it was being started
            self._interrupt(signal.SIGINT)
        try:
            return self._child.wait()
        finally:
            self._child = None

    def wait(self, seconds: float) -> bool:
        """Waits for at most so many seconds; True when it is time to stop."""
        if self.signal is None and seconds > 0:
            select.select([self._wakes], [], [], seconds)
        return self.signal is not None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends the waiting, and the run: at first as Ctrl-C does, the second time by SIGTERM."""
        is_first = self.signal is None
        self.signal = self.signal or number
        with contextlib.suppress(BlockingIOError):  # it is awake
            os.write(self._wake, b"\0")
        self._interrupt(signal.SIGINT if is_first else signal.SIGTERM)

    def _interrupt(self, number: int) -> None:
        child = self._child
        if child is not None and child.returncode is None:
            child.send_signal(number)


class Printer:
    """A line for each thing that happens."""

    def __init__(self, zone: tzinfo, what: str, as_json: bool) -> None:
        self._zone, self._what, self._as_json = zone, what, as_json

    def say(self, kind: Kind, fields: dict[str, Any]) -> None:
        """Prints one line."""
        if self._as_json:
            print(json.dumps({"time": time.time(), "event": kind, **fields}), flush=True)
            return
        match kind:
            case "waiting":
                text = f"next run at {self._local(fields['due'])}"
                if fields["failures"]:
                    text += f", after {fields['failures']} failure(s) in a row"
            case "missed":
                text = f"the run of {self._local(fields['due'])} was missed and is made up now"
            case "started":
                text = f"runs {self._what}"
            case "ended" | "failed":
                seconds = fields["ended"] - fields["started"]
                text = f"{kind} with exit code {fields['exit_code']} after {seconds:.0f} s"
            case "stopped":
                text = "stopped; what is due stays due"
            case "note":
                text = fields["text"]
        print(f"{self._local(time.time())} cron: {text}", flush=True)

    def _local(self, seconds: float) -> str:
        return datetime.fromtimestamp(seconds, self._zone).strftime("%Y-%m-%d %H:%M:%S %Z")
