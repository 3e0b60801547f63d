"""How events and results look: bars on a terminal, quiet lines elsewhere."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from pipeline.workflow import Event, PlannedStep

LINE_EVERY_S = 10.0
WAIT_LINE_EVERY_S = 5.0
SAID_FROM_BYTES = 1 << 28  # of reading before there is a plan
CLASSES_SHOWN, REFUSED_SHOWN, LABELS_SHOWN = 20, 10, 5  # of a data set
LINE_CHARACTERS = 120  # of a name that may hold anything


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
        self.console.print(
            f"{step:<10} {text}", style=style, highlight=False, markup=False, soft_wrap=True
        )


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


def in_bytes(count: float) -> str:
    """A size as a person reads it: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


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
            console.print(f"note: {row['warning']}", highlight=False, markup=False)
    console.print(f"drawn: {output}", highlight=False, soft_wrap=True)


def show_exchanged(console: Console, verb: str, target: Path, exchanged: Any) -> None:
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
    console.print(f"{verb} {target} to {exchanged.output}", highlight=False, soft_wrap=True)
    for heading, text in rows.items():
        console.print(f"{heading:10} {text}", markup=False, highlight=False, soft_wrap=True)
    for note in exchanged.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def show_dataset(console: Console, document: Mapping[str, Any], contact_sheet: Path) -> None:
    """Prints what a preprocessed data set holds, what it does not hold and why."""
    from pipeline.readers.names import show  # numpy: only here

    def say(text: str) -> None:  # names may look like markup or :emoji:
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    digits = ".4g" if document["dtype"] == "float32" else ".1f"
    files = [file for shard in document["shards"] for file in shard["files"]]
    directories = [shard["directory"] for shard in document["shards"] if shard["files"]]
    more = f" and {len(directories) - 1:,} more" if len(directories) > 1 else ""
    such_as = ", ".join(show(name, LINE_CHARACTERS) for name in document["ignored_first"])
    rows = {
        "items": ", ".join(f"{count:,} {split}" for split, count in document["counts"].items()),
        "shape": " x ".join(map(str, document["shape"])) + f", {document['dtype']}",
        "mean": ", ".join(f"{mean:{digits}}" for mean in document["channel_mean"])
        + " by channel, of the training split",
        "deviation": ", ".join(f"{std:{digits}}" for std in document["channel_std"]),
        "sources": _sources(document["inputs"]),
        "Arrow files": f"{len(files):,}, {in_bytes(sum(file['bytes'] for file in files))}, in "
        f"{directories[0]}{more}, below the storage root",
        "transform": _transform(document["transform"]),
        "limits": _limits(document["transform"], show),
        "left out": ", ".join(f"{n:,} by {why}" for why, n in document["left_out"].items())
        + (f"; by name such as {such_as}" if such_as else ""),
        "animated": f"{n:,}, of each the first frame" if (n := document["animated"]) else "",
        "refused": f"{document['refused']['count']:,}",
        "contact sheet": str(contact_sheet),
    }
    for heading, text in rows.items():
        if text:
            say(f"{heading:15}{text}")
    for lines in (_classes(document, show), _refused(document["refused"], show)):
        for line in ["", *lines] if lines else []:
            say(line)


def _sources(inputs: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(i["format"] for i in inputs if i["format"] != "files")
    parts = [f"{count:,} {kind}" for kind, count in counts.items()]
    if loose := sum(len(i["files"]) for i in inputs if i["format"] == "files"):
        parts.append(f"{loose:,} loose files")
    return ", ".join([*parts, in_bytes(sum(i["bytes"] for i in inputs))])


def _transform(data: Mapping[str, Any]) -> str:
    if data["sequence_shape"] is not None:
        return "none, sequences are kept as they are"
    draft = ", jpeg_draft" if data["jpeg_draft"] else ""
    return (
        f"resolution {data['resolution']}, mode {data['mode']}, fit {data['fit']}, resample "
        f"{data['resample']}, background {data['background']}{draft}"
    )


def _limits(data: Mapping[str, Any], show: Callable[[str, int], str]) -> str:
    """The settings by which something may be left out, refused or held out."""
    parts = [f"{split} {data[f'{split}_fraction']:g}" for split in ("validation", "test")]
    if data["sequence_shape"] is None:
        parts.append(f"max_pixels {data['max_pixels']:,}")
        parts.append(f"min_resolution_px {data['min_resolution_px']:,}")
    parts += [name for name in ("require_labels", "drop_duplicates") if data[name]]
    if labels := data["include_labels"]:
        named = ", ".join(show(str(label), LINE_CHARACTERS) for label in labels[:LABELS_SHOWN])
        more = f" and {len(labels) - LABELS_SHOWN:,} more" if len(labels) > LABELS_SHOWN else ""
        parts.append(f"include_labels {named}{more}")
    return ", ".join(parts)


def _classes(document: Mapping[str, Any], show: Callable[[str, int], str]) -> list[str]:
    """A table of how often each class is in each split; nothing where nothing has a label."""
    labels, unlabelled = document["labels"], document["unlabelled"]
    names = list(dict.fromkeys(name for counts in labels.values() for name in counts))
    if not names:
        return []
    table = [(f"classes ({len(names):,})", *labels)]
    for name in names[:CLASSES_SHOWN]:
        counts = (f"{counts.get(name, 0):,}" for counts in labels.values())
        table.append((show(name, LINE_CHARACTERS), *counts))
    lines = _aligned(table)
    if len(names) > CLASSES_SHOWN:
        lines.append(f"and {len(names) - CLASSES_SHOWN:,} more")
    if any(unlabelled.values()):
        lines.append("without label: " + ", ".join(f"{n:,} {s}" for s, n in unlabelled.items()))
    return lines


def _refused(refused: Mapping[str, Any], show: Callable[[str, int], str]) -> list[str]:
    """Reasons with their counts, then the first items."""
    items = refused["items"]
    if not items:
        return []
    counts = ((reason, f"{count:,}") for reason, count in refused["by_reason"].items())
    lines = _aligned([("refused", "count"), *counts])
    for item in items[:REFUSED_SHOWN]:
        source, detail = (show(item[key], LINE_CHARACTERS) for key in ("source", "detail"))
        lines.append(f"{source}: {item['reason']}, {detail}")
    if len(items) > REFUSED_SHOWN:
        more = len(items) - REFUSED_SHOWN
        lines.append(f"and {more:,} more, all in quarantine.jsonl, beside dataset.json")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, the first column flush left, the others flush right; never wrapped."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        (first + " " * (widths[0] - cell_len(first)))
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for first, *cells in rows
    ]
