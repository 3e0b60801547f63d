"""How events and results look: bars on a terminal, quiet lines elsewhere."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from pipeline.driver import Plan
from pipeline.settings import Config
from pipeline.storage import in_bytes
from pipeline.torchrun import torchrun_world
from pipeline.workflow import Event, PlannedStep

LINE_EVERY_S = 10.0
WAIT_LINE_EVERY_S = 5.0
SAID_FROM_BYTES = 1 << 28  # of reading before there is a plan


class PlainConsole(Console):
    """One whose reader may go, as `head` does: then the work is done unseen."""

    def on_broken_pipe(self) -> None:
        """Takes the place of an exit, which would end a run as if it were interrupted."""
        self.quiet = True
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # also for what is still buffered


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: a path may look like markup, or an emoji."""
    return PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


def show_plan(console: Console, run: str, steps: Sequence[PlannedStep]) -> None:
    """Prints what would happen to each step, and why."""
    table = Table(box=None, pad_edge=False, title=f"run {run}", title_justify="left")
    table.add_column("step")
    table.add_column("will")
    table.add_column("because", overflow="fold")
    styles = {"cached": "dim", "run": "bold", "extend": "bold"}
    for p in steps:
        word = {"cached": "be kept", "run": "run", "extend": "continue"}[p.action]
        table.add_row(p.step.name, word, p.reason, style=styles[p.action])
    console.print(table)


def say_what_is_left(console: Console, config: Config, planned: Plan) -> None:
    """Prints how many steps a command is going to do, and where."""
    left = [p for p in planned.steps if p.action != "cached"]
    if not left:
        return
    places = config.cluster.address or "Ray on this machine"
    if (world := torchrun_world()) is not None:
        places = f"{world.world_size} ranks of torchrun, what comes before training on {places}"
    console.print(
        f"run {planned.run}: {len(left)} of {len(planned.steps)} steps to do, on {places}; "
        "steps share the cluster where they fit, otherwise one follows the other",
        soft_wrap=True,
    )


class EventPrinter:
    """Shows the events of a run. Use `live` around the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told_at: dict[str, float] = {}

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Shows bars while the block runs, if this is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[details]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None
                self._tasks.clear()

    def observe(self, event: Event) -> None:
        """Shows one event."""
        fields = event.fields
        match event.kind:
            case "cached":
                self._line(event.step, "kept", style="dim")
            case "started":
                word = "continues" if fields["action"] == "extend" else "runs"
                self._line(event.step, f"{word}: {fields['reason']}")
            case "finished":
                self._drop_bar(event.step)
                self._line(event.step, f"done in {fields['seconds']:.1f} s", style="green")
            case "failed":
                self._drop_bar(event.step)
                self._line(event.step, f"failed: {fields['error']}", style="red")
            case "note":
                self._line(event.step, fields["text"])
            case "progress":
                self._progress(event.step, fields)
            case "waiting":
                self.wait(fields["holder"], fields["left_s"], event.step)

    def wait(self, holder: Mapping[str, Any], left_s: float, what: str = "run") -> None:
        """Says who is waited for; the countdown runs only while the holder does not beat."""
        if not self._is_due(f"wait {what}", WAIT_LINE_EVERY_S):
            return
        self._line(
            what,
            f"waiting for process {holder['pid']} on {holder['host']}; its lease ends in "
            f"{left_s:.0f} s unless renewed",
        )

    def hashes(self, num_files: int, num_bytes: int) -> None:
        """Says that files are read to be hashed, if that takes a while."""
        if num_bytes > SAID_FROM_BYTES:
            files = "file" if num_files == 1 else "files"
            self._line("input", f"reading {num_files:,} new {files}, {in_bytes(num_bytes)}")

    def _progress(self, step: str, fields: Mapping[str, Any]) -> None:
        details = _details(fields)
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, details="")
            self._bars.update(
                self._tasks[step],
                total=fields["total"],
                completed=fields["done"],
                details=details,
            )
        elif self._is_due(step, LINE_EVERY_S):
            self._line(step, details)

    def _drop_bar(self, step: str) -> None:
        if self._bars is not None and step in self._tasks:
            self._bars.remove_task(self._tasks.pop(step))

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._told_at.get(what, -every_s) < every_s:
            return False
        self._told_at[what] = now
        return True

    def _line(self, step: str, text: str, style: str | None = None) -> None:
        self.console.print(f"{step:<10} {text}", style=style, soft_wrap=True)


def _details(fields: Mapping[str, Any]) -> str:
    parts = [f"{fields['done']:,} of {fields['total']:,} {fields['unit']}"]
    if "rate" in fields:
        parts.append(f"{fields['rate']:,.0f} {fields['rate_unit']}")
    if "total_bytes" in fields:
        parts.append(f"{in_bytes(fields['bytes'])} of {in_bytes(fields['total_bytes'])}")
    if fields.get("refused"):
        parts.append(f"{fields['refused']:,} refused")
    if "loss" in fields:
        parts.append(f"loss {fields['loss']:.4f}")
    if "left_s" in fields:
        minutes, seconds = divmod(round(fields["left_s"]), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(parts)


def show_schedules(console: Console, rows: list[dict[str, Any]], output: Path) -> None:
    """Prints what the beta study measured, and where it is drawn."""
    table = Table(box=None, pad_edge=False)
    for heading in ("schedule", "signal left at the end", "steps near pure noise"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["name"], f"{row['signal_left']:.2g}", f"{row['near_noise']:.1%}")
    console.print(table)
    for row in rows:
        if row["warning"]:
            console.print(f"note: {row['warning']}")
    console.print(f"drawn: {output}", soft_wrap=True)


def show_exchanged(console: Console, verb: str, target: Path | str, exchanged: Any) -> None:
    """Prints what an import or export wrote."""
    document = exchanged.document
    unet = document.model_dump(mode="json")["unet"]
    schedule = document.schedule
    version = document.source.library_version
    rows = {
        "from": f"{document.source.library} {version}" if version else document.source.library,
        "network": ", ".join(f"{key} {value}" for key, value in unet.items() if value),
        "schedule": f"{schedule.name}, {schedule.num_train_timesteps:,} timesteps",
        "objective": f"{document.objective}, weighting {document.weighting}",
        "weights": f"{' and '.join(document.weights)} after {document.global_step:,} steps, "
        f"{exchanged.num_parameters:,} numbers",
    }
    console.print(f"{verb} {target} to {exchanged.output}", soft_wrap=True)
    for heading, text in rows.items():
        console.print(f"{heading:10} {text}", soft_wrap=True)
    for note in exchanged.notes:
        console.print(f"note: {note}", soft_wrap=True)
