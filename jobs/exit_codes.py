"""Errors as sentences and exit codes."""

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

from jobs.results import print_json
from pipeline.cluster import end_own_ray
from pipeline.errors import RaydiffusionError

INTERRUPTED_EXIT_CODE = 130
KEPT = "Interrupted. Finished steps and checkpoints are kept; the same command continues."


@contextlib.contextmanager
def errors_to_exit_codes(as_json: bool, on_interrupt: str | None = KEPT) -> Iterator[None]:
    """The one place where errors become sentences and exit codes.

    Args:
        as_json: whether an error is printed as JSON too.
        on_interrupt: what is said when the process was told to end; None: nothing.
    """
    try:
        yield
    except RaydiffusionError as error:
        if as_json:
            print_json({"error": str(error), "exit_code": error.exit_code})
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM where it is handled
        if on_interrupt is not None:
            typer.echo(on_interrupt, err=True)
        sys.stdout.flush()
        end_own_ray()
        os._exit(INTERRUPTED_EXIT_CODE)  # threads of running steps must not hold us up
