"""The verb `sample`: images of a model as files."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import EventPrinter, make_console
from jobs.exit_codes import errors_to_exit_codes
from jobs.options import AsJson, Overrides, TrainedRoot, TrainedTarget
from jobs.results import print_json

app = typer.Typer()


@app.command()
def sample(
    target: TrainedTarget,
    output: Annotated[Path, typer.Option(help="the folder to write")],
    num_samples: Annotated[int, typer.Option("--num", min=1, help="how many")] = 64,
    label: Annotated[
        str | None, typer.Option(help="of one class, for a model that is told the class")
    ] = None,
    root: TrainedRoot = "runs",
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Draw samples of a trained model on this machine, without Ray, as PNG and Arrow files."""
    console = make_console(stderr=as_json)
    printer = EventPrinter(console)
    with errors_to_exit_codes(as_json, on_interrupt="Interrupted. Nothing is written."):
        from pipeline.sample_files import write_samples  # torch: only here

        with printer.live():
            done = write_samples(
                target,
                output,
                num_samples=num_samples,
                observer=printer.observe,
                label=label,
                overrides=set_ or (),
                root=root,
            )
        if as_json:
            print_json(asdict(done))
        else:
            text = f"{done.num_samples:,} samples of {done.name} in {done.output}"
            console.print(text, soft_wrap=True)
