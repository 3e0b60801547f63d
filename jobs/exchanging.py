"""The verbs `import` and `export`: models from and for other libraries."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.console import make_console, show_exchanged
from jobs.exit_codes import errors_to_exit_codes
from jobs.options import AsJson, Overrides, TrainedRoot
from jobs.results import exchanged_json, print_json
from pipeline.errors import ConfigError

app = typer.Typer()


@app.command("import")
def import_(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="a .pt file, or diffusers' scheduler_config.json"
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="the model folder to write")] = None,
    objective: Annotated[
        str | None, typer.Option(help="what the network predicts, where the file does not say")
    ] = None,
    library_version: Annotated[
        str | None, typer.Option(help="of the library that wrote it, likewise")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=C", help="of the network, likewise; as heads=4"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read another library's checkpoint into a folder, or print a scheduler config as TOML."""
    with errors_to_exit_codes(as_json):
        is_scheduler = target.is_dir() or target.suffix == ".json"
        if is_scheduler and (output or objective or library_version or set_):
            raise ConfigError(
                f"{target} is a scheduler config, which is printed and takes no options. "
                "Leave them out."
            )
        if not is_scheduler and output is None:
            raise ConfigError("import of a checkpoint needs --output. Name a new directory.")
        from pipeline.exchange import import_checkpoint, import_scheduler_config  # torch: only here

        if output is None:
            read = import_scheduler_config(target)
            if as_json:
                sections = {"diffusion": read.diffusion, "evaluate": read.evaluate}
                print_json({**sections, "notes": read.notes})
            else:
                print("\n".join([*(f"# {note}" for note in read.notes), read.to_toml()]).strip())
            return
        done = import_checkpoint(
            target,
            output,
            objective=objective,
            library_version=library_version,
            overrides=set_ or (),
        )
        if as_json:
            print_json(exchanged_json(done))
        else:
            show_exchanged(make_console(), "imported", target, done)


@app.command()
def export(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|CONFIG|NAME[@VERSION]",
            help="a model folder, a config that is trained, or a model for its champion",
        ),
    ],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    root: TrainedRoot = "runs",
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write EMA weights as safetensors with a scheduler config that diffusers loads."""
    with errors_to_exit_codes(as_json):
        from pipeline.exchange import export_model  # torch: only here

        done = export_model(target, output, set_ or (), root=root)
        if as_json:
            print_json(exchanged_json(done))
        else:
            show_exchanged(make_console(), "exported", target, done)
