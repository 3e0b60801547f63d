"""The verbs. Each loads the config, calls one pipeline function, and prints.

Nothing imported here imports torch or Ray: a command with nothing to do answers at once.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import cleaning, cron, exchanging, registry, retrain, sampling, submit
from jobs.console import EventPrinter, make_console, say_what_is_left, show_plan, show_schedules
from jobs.diagnosis import diagnose
from jobs.exit_codes import errors_to_exit_codes
from jobs.inspection import show_dataset
from jobs.options import AsJson, ConfigPath, Overrides
from jobs.rehearsal import rehearse
from jobs.results import (
    outcome_json,
    plan_json,
    print_json,
    show_outcome,
    show_run,
    show_runs,
)
from jobs.scores import show_comparison
from jobs.tune import command_of, show_search
from pipeline.config import load_config
from pipeline.drill import NUM_STEPS, OUTAGE_S, Kind
from pipeline.driver import Outcome, make_plan, run_config
from pipeline.errors import ConfigError
from pipeline.publish import publish_again
from pipeline.runs import list_runs, read_progress, read_run
from pipeline.settings import Config
from pipeline.steps import STEP_NAMES
from pipeline.storage import open_storage
from pipeline.subject_kinds import Subject, find_subject
from pipeline.targets import find_run
from pipeline.torchrun import dismiss, sigterm_awaits_checkpoint, torchrun_world

UNDER_TORCHRUN = (("preprocess",), ("train",))

app = typer.Typer(
    help="Train diffusion models on your own images, and know how good they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

NoWait = Annotated[
    bool, typer.Option("--no-wait", help="leave with exit code 8 when another process works on it")
]


@app.command()
def run(
    config: ConfigPath, set_: Overrides = None, as_json: AsJson = False, no_wait: NoWait = False
) -> None:
    """Do the whole workflow; finished steps are kept, an interrupted one continues."""
    _run_steps(config, set_, as_json, no_wait, STEP_NAMES)


@app.command()
def preprocess(
    config: ConfigPath,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="print the manifest and draw a contact sheet")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="the contact sheet, a PNG file; otherwise beside the data set"),
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    no_wait: NoWait = False,
) -> None:
    """Turn the images into Arrow shards."""
    _run_steps(config, set_, as_json, no_wait, ("preprocess",), inspect=inspect, output=output)


@app.command()
def train(
    config: ConfigPath, set_: Overrides = None, as_json: AsJson = False, no_wait: NoWait = False
) -> None:
    """Train, and do what training needs. Under torchrun it trains without Ray."""
    if (world := torchrun_world()) is None:
        _run_steps(config, set_, as_json, no_wait, ("train",))
    elif world.rank == 0:
        try:
            with sigterm_awaits_checkpoint():
                _run_steps(config, set_, as_json, no_wait, ("train",))
        finally:
            dismiss()
    else:
        with errors_to_exit_codes(as_json, on_interrupt=None):  # rank 0 speaks
            from pipeline.train import train_under_torchrun

            train_under_torchrun(world)


@app.command()
def evaluate(
    config: ConfigPath,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="a model made elsewhere: a model folder or a checkpoint, as for import"),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="images in place of samples: as data.sources; may be repeated"),
    ] = None,
    converts: Annotated[
        bool, typer.Option("--convert", help="take images of another size or with other channels")
    ] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
    no_wait: NoWait = False,
) -> None:
    """Sample and score, and do what that needs; or score another model, or images."""

    def find(loaded: Config) -> Subject | None:
        return find_subject(loaded, checkpoint=checkpoint, images=images or (), converts=converts)

    target = "evaluate" if checkpoint is None and not images else "report"  # of that alone
    _run_steps(config, set_, as_json, no_wait, (target,), find_subject=find)


@app.command()
def tune(
    config: ConfigPath, set_: Overrides = None, as_json: AsJson = False, no_wait: NoWait = False
) -> None:
    """Search for a better schedule by short trainings, and say honestly whether it is better."""
    _run_steps(config, set_, as_json, no_wait, ("tune",))


@app.command()
def compare(
    first: Annotated[
        str, typer.Argument(help="a config, a run's name, or a file score-<hash>.json")
    ],
    second: Annotated[str, typer.Argument(help="likewise")],
    set_: Overrides = None,
    root: Annotated[str, typer.Option(help="the storage root of a run's name")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Put two scores side by side; refused where their protocols differ."""
    with errors_to_exit_codes(as_json):
        from pipeline.protocol import compare_records, read_record  # torch: only here

        records = [read_record(target, root, set_ or ()) for target in (first, second)]
        comparison = compare_records((first, second), records)
        if as_json:
            print_json(asdict(comparison))
        else:
            show_comparison(make_console(), comparison)


@app.command()
def plan(config: ConfigPath, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Print which steps are cached, which would run, and why. Starts nothing."""
    with errors_to_exit_codes(as_json):
        planned = make_plan(load_config(config, set_ or ()), read_remote=False)
        if as_json:
            print_json(plan_json(planned))
        else:
            show_plan(make_console(), planned.run, planned.steps)


@app.command()
def doctor(config: ConfigPath, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Check what a run needs, here and on every node of the cluster, and say what is wrong."""
    with errors_to_exit_codes(as_json):
        diagnose(load_config(config, set_ or ()), as_json=as_json)


@app.command()
def drill(
    config: ConfigPath,
    kill: Annotated[Kind, typer.Option(help="what is struck in the middle")],
    num_steps: Annotated[
        int, typer.Option("--steps", help="optimiser steps of the training")
    ] = NUM_STEPS,
    outage_s: Annotated[
        float, typer.Option("--outage", help="seconds that storage stays away, once it is missed")
    ] = OUTAGE_S,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train for a while on this machine, break something, and say what that cost."""
    with errors_to_exit_codes(as_json, on_interrupt="Interrupted. Nothing of the drill is left."):
        rehearse(
            load_config(config, set_ or ()),
            kill,
            num_steps=num_steps,
            outage_s=outage_s,
            as_json=as_json,
        )


@app.command()
def status(
    target: Annotated[str, typer.Argument(help="a config, a run's name, or a storage root")] = "",
    set_: Overrides = None,
    root: Annotated[str, typer.Option(help="the storage root of a run's name")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Print what a run did, or the runs below a storage root."""
    with errors_to_exit_codes(as_json):
        cycle = None
        if target.endswith(".toml"):
            storage, run_name, cycle = find_run(load_config(target, set_ or ()))
        elif target and not _is_root(target):
            storage, run_name = open_storage(root), target
        else:
            storage, run_name = open_storage(target or root), None
        if run_name is None:
            documents = [read_run(storage, name) for name in list_runs(storage)]
            if as_json:
                print_json({"runs": documents})
            else:
                show_runs(make_console(), storage.uri, documents)
        else:
            document = read_run(storage, run_name)
            document["progress"] = read_progress(storage, document)
            document["cycle"] = cycle
            print_json(document) if as_json else show_run(make_console(), document)


@app.command()
def report(
    target: Annotated[
        str, typer.Argument(help="a config, a storage root, or the name of a run with a search")
    ],
    set_: Overrides = None,
    root: Annotated[str, typer.Option(help="the storage root of a run's name")] = "runs",
    as_json: AsJson = False,
    no_wait: NoWait = False,
) -> None:
    """Write a run's report, a search's page, or the home page of a storage root."""
    if target.endswith(".toml"):
        _run_steps(Path(target), set_, as_json, no_wait, ("report",))
        return
    with errors_to_exit_codes(as_json):
        if _is_root(target):
            from pipeline.report.home import write_home  # torch: only here

            what, page = "home", write_home(open_storage(target))
        else:
            what, page = "search", publish_again(open_storage(root), target)
        if as_json:
            print_json({what: page})
        else:
            make_console().print(f"{what}: {page}", soft_wrap=True)


@app.command()
def schedules(
    target: Annotated[
        list[str] | None, typer.Argument(help="a config, or schedule names; none is all of them")
    ] = None,
    num_train_timesteps: Annotated[
        int, typer.Option("--timesteps", help="T of the named ones")
    ] = 1000,
    image: Annotated[Path | None, typer.Option(help="a picture to noise")] = None,
    output: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("schedules.html"),
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Draw noise schedules side by side: signal, noise, log SNR, and an image noised."""
    with errors_to_exit_codes(as_json):
        names = target or []
        config = None
        if any(name.endswith(".toml") for name in names):
            if len(names) > 1:
                raise ConfigError("schedules takes one config or names, not both. Give one kind.")
            config = load_config(names[0], set_ or ())
        from pipeline.report.schedules import write_config_study, write_study  # torch: only here

        if config is not None:
            rows = write_config_study(config, image, output)
        else:
            rows = write_study(names, num_train_timesteps, image, output)
        if as_json:
            print_json({"output": str(output), "schedules": rows})
        else:
            show_schedules(make_console(), rows, output)


for part in (retrain, sampling, exchanging, registry, submit, cron, cleaning):
    app.add_typer(part.app)


def _run_steps(
    path: Path,
    overrides: list[str] | None,
    as_json: bool,
    no_wait: bool,
    targets: tuple[str, ...],
    *,
    inspect: bool = False,
    output: Path | None = None,
    find_subject: Callable[[Config], Subject | None] = lambda config: None,
) -> None:
    console = make_console(stderr=as_json)
    printer = EventPrinter(console)
    with errors_to_exit_codes(as_json):
        started = time.monotonic()
        if torchrun_world() is not None and targets not in UNDER_TORCHRUN:
            raise ConfigError(
                "Under torchrun every rank runs the same command, and this one is not for all of "
                "them. Use torchrun for the verbs train and preprocess, and none for the others."
            )
        config = load_config(path, overrides or ())
        # Ray prints to stdout when a worker dies, where a program expects one JSON object.
        stdout = contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)
        with printer.live(), stdout:
            outcome = run_config(
                config,
                targets,
                observer=printer.observe,
                on_plan=lambda planned: say_what_is_left(console, config, planned),
                on_wait=printer.wait,
                on_hash=printer.hashes,
                wait_for_lease=not no_wait,
                subject=find_subject(config),
                command=command_of(path, overrides or ()),
            )
        seconds = time.monotonic() - started
        inspected = _inspect(outcome, config, output) if inspect else {}
        if as_json:
            print_json(outcome_json(outcome, seconds) | inspected)
            return
        show_outcome(console, outcome, seconds)
        if "tune" in outcome.manifests:
            metrics = outcome.manifests["tune"]["metrics"]
            show_search(console, metrics, command_of(path, overrides or ()))
        if inspected:
            show_dataset(console, inspected["dataset"], inspected["contact_sheet"])


def _is_root(target: str) -> bool:
    """Whether a storage root is meant, and not the name of a run."""
    return Path(target).is_dir() or "://" in target


def _inspect(outcome: Outcome, config: Config, output: Path | None) -> dict[str, Any]:
    """The document of the data set, and where its contact sheet was drawn."""
    from pipeline.dataset import read_dataset
    from pipeline.report.contact_sheet import write_contact_sheet

    manifest = outcome.manifests["preprocess"]
    storage, cache_bytes = outcome.plan.storage, config.data.cache_bytes
    contact_sheet = write_contact_sheet(storage, manifest, output, cache_bytes)
    return {"dataset": read_dataset(storage, manifest), "contact_sheet": contact_sheet}
