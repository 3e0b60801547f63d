"""What the verbs about a search print: what was found, and the command that trains it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import is_secret
from pipeline.publish import training_command


def as_typed(config: Path, overrides: Sequence[str]) -> str:
    """A config and its `--set` options as they can be typed into a shell.

    Without those of the section `notify`, which may be secrets: this is for records and pages.
    """
    shown = [text for text in overrides if not is_secret(text)]
    given = [part for text in shown for part in ("--set", text)]
    return shlex.join([str(config), *given])


def show_search(console: Console, metrics: Mapping[str, Any], target: str) -> None:
    """Prints what a search found."""
    verdict, number = metrics["verdict"], metrics["recommended"]
    name = "the config as it is" if number == 0 else f"trial {number:04d}"
    if verdict["kind"] == "best":
        said = f"{name} is best, beyond the spread over seeds"
    elif verdict["kind"] == "unopposed":
        said = f"only {name} was trained to the end, so there is nothing to compare"
    else:
        tied = ", ".join("as configured" if n == 0 else f"{n:04d}" for n in verdict["tied"])
        said = f"not distinguishable within the spread over seeds: {tied}; recommended: {name}"
    counts = ", ".join(f"{count} {word}" for word, count in metrics["counts"].items())
    for line in (f"search: {said}", f"{counts}, {metrics['cost']['images']:,} images"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print("to train it:", highlight=False)
    text = training_command(metrics["overrides"], target)
    console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
