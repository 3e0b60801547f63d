"""Options that verbs have in common."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a TOML file")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="override a setting; may be repeated"),
]
TrainedTarget = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|NAME[@VERSION]",
        help="a config that is trained, or a model for its champion or that version",
    ),
]
TrainedRoot = Annotated[str, typer.Option("--root", help="the storage root of a model's name")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
