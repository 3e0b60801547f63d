"""What the verbs about a search print: what was found, and the command that trains it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import command_line
from pipeline.publish import training_command
from pipeline.submission import SUBMITTED_AS


def command_of(config: Path, overrides: Sequence[str]) -> str:
    """What runs a config with its `--set` options, as it can be typed after `raydiffusion`.

    In a job that was submitted: what submits it, from where that was done. Without settings of the
    section `notify`, which may be secrets: this is for records and pages.
    """
    if (submitted := os.environ.get(SUBMITTED_AS)) is not None:
        return submitted
    return command_line("run", config, overrides)


def show_search(console: Console, metrics: Mapping[str, Any], command: str) -> None:
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
        console.print(line, soft_wrap=True)
    console.print("to train it:")
    text = training_command(metrics["overrides"], command)
    console.print(f"  {text}", soft_wrap=True)
