"""Options that verbs have in common."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a TOML file")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="override a setting; may be repeated"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
