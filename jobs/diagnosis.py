"""What `doctor` prints: every check of the preflight, as a table or as one JSON object."""

import contextlib
import sys

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.console import make_console
from jobs.results import print_json
from pipeline.preflight import Check, examine
from pipeline.settings import Config

STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


def diagnose(config: Config, *, as_json: bool) -> None:
    """Makes every check, prints what came of them, and ends as the first failure would.

    Raises:
        RaydiffusionError: of the first check that failed.
        typer.Exit: likewise, where the JSON has said it all.
    """
    console = make_console(stderr=as_json)
    # Ray prints to stdout when a worker dies, where a program expects one JSON object.
    quiet = contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)
    with console.status("looking"), quiet:
        checks = list(examine(config))
    error = next((check.error for check in checks if check.error is not None), None)
    if as_json:
        document = {
            "ok": error is None,
            "exit_code": error.exit_code if error is not None else 0,
            "checks": [{"name": c.name, "status": c.status, "detail": c.detail} for c in checks],
        }
        print_json(document)
        if error is not None:
            raise typer.Exit(error.exit_code)
        return
    show_checks(console, checks)
    if error is not None:
        raise error


def show_checks(console: Console, checks: list[Check]) -> None:
    """Prints one row a check."""
    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("is", no_wrap=True)
    table.add_column("because", overflow="fold")
    for check in checks:
        detail = Text(check.detail)
        table.add_row(check.name, Text(check.status, STYLES[check.status]), detail)
    console.print(table)
