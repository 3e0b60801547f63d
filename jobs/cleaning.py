"""The verb `gc`: deletes what nothing needs any more below a storage root."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.console import make_console
from jobs.exit_codes import errors_to_exit_codes
from jobs.options import AsJson, Overrides
from jobs.results import print_json
from pipeline.config import load_config
from pipeline.garbage import GRACE_S, KEEP_RUNS, Survey, Unit, collect_garbage
from pipeline.storage import in_bytes, open_storage

DAY_S = 86_400.0
SHOWN = 20  # of what a dry run would delete
INTERRUPTED = "Interrupted. What is left is whole; the same command goes on."

app = typer.Typer()


@app.command()
def gc(
    target: Annotated[str, typer.Argument(help="a storage root, or a config that names it")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be deleted, and delete nothing")
    ] = False,
    keep_runs: Annotated[
        int, typer.Option(min=0, help="records of each model's latest runs that stay at any age")
    ] = KEEP_RUNS,
    grace_days: Annotated[
        float, typer.Option(min=0, help="what was written within so many days stays")
    ] = GRACE_S / DAY_S,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Delete what no run, model version, search or lease reaches."""
    with errors_to_exit_codes(as_json, on_interrupt=INTERRUPTED):
        root = target or "runs"
        if target.endswith(".toml"):
            root = load_config(target, set_ or ()).storage.root
        storage = open_storage(root)
        survey = collect_garbage(
            storage, keep_runs=keep_runs, grace_s=grace_days * DAY_S, dry_run=dry_run
        )
        if as_json:
            print_json(_to_json(survey, storage.uri, dry_run))
        else:
            _show(survey, storage.uri, dry_run)


def _show(survey: Survey, uri: str, dry_run: bool) -> None:
    if not survey.garbage:
        _say(f"There is nothing to delete below {uri}.")
    else:
        table = Table(box=None, pad_edge=False)
        table.add_column("would be deleted" if dry_run else "deleted")
        table.add_column("number", justify="right")
        table.add_column("size", justify="right")
        for kind in dict.fromkeys(unit.kind for unit in survey.garbage):
            units = [unit for unit in survey.garbage if unit.kind == kind]
            table.add_row(kind, f"{len(units):,}", in_bytes(_num_bytes(units)))
        table.add_row("together", f"{len(survey.garbage):,}", in_bytes(_num_bytes(survey.garbage)))
        make_console().print(table)
    if dry_run:
        for unit in survey.garbage[:SHOWN]:
            last = time.strftime("%Y-%m-%d", time.localtime(unit.modified))
            _say(f"  {unit.path}  {in_bytes(unit.num_bytes)}, last written {last}")
        if len(survey.garbage) > SHOWN:
            _say(f"  and {len(survey.garbage) - SHOWN:,} more; --json lists all")
    kept = f"stays: {in_bytes(_num_bytes(survey.reached))} in use, by {len(survey.runs):,} runs"
    if survey.young:
        kept += f"; {in_bytes(_num_bytes(survey.young))} too new to go, or worked on"
    _say(kept)


def _to_json(survey: Survey, uri: str, dry_run: bool) -> dict[str, Any]:
    def total(units: Sequence[Unit]) -> dict[str, int]:
        return {"count": len(units), "bytes": _num_bytes(units)}

    names = ("path", "kind", "num_bytes", "modified")
    return {
        "root": uri,
        "dry_run": dry_run,
        "deleted": total(survey.garbage)
        | {
            "items": [
                {name: asdict(unit)[name] for name in names} for unit in survey.garbage
            ]
        },
        "reached": total(survey.reached),
        "young": total(survey.young),
        "runs": survey.runs,
    }  # fmt: skip


def _num_bytes(units: Sequence[Unit]) -> int:
    return sum(unit.num_bytes for unit in units)


def _say(text: str) -> None:
    make_console().print(text, soft_wrap=True)
