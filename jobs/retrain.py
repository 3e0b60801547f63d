"""The verbs of retraining: `retrain`, `accept-reference`."""

import contextlib
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.console import EventPrinter, make_console, say_what_is_left
from jobs.exit_codes import errors_to_exit_codes
from jobs.options import AsJson, ConfigPath, Overrides
from jobs.results import outcome_json, print_json, show_outcome
from jobs.scores import show_score
from jobs.tune import command_of
from pipeline.accept import Accepted, accept_reference, config_of_champion
from pipeline.config import load_config
from pipeline.errors import ConfigError, RefusedError
from pipeline.retrain import Cycle
from pipeline.retrain import retrain as retrain_model
from pipeline.storage import open_storage
from pipeline.torchrun import torchrun_world

app = typer.Typer()

Reason = Annotated[str, typer.Option(help="kept with the record, for those who ask later")]


@app.command()
def retrain(
    config: ConfigPath,
    accept_held: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-held",
            metavar="SHARD",
            help="take a held shard in: its name, or the beginning of its SHA-256; may be repeated",
        ),
    ] = None,
    reason: Reason = "accepted",
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train on what is new, from the champion, and promote the model if it is better."""
    console = make_console(stderr=as_json)
    printer = EventPrinter(console)
    with errors_to_exit_codes(as_json):
        started = time.monotonic()
        _refuse_torchrun()
        loaded = load_config(config, set_ or ())
        with printer.live(), _stdout_kept_for_json(as_json):
            cycle = retrain_model(
                loaded,
                observer=printer.observe,
                on_plan=lambda planned: say_what_is_left(console, loaded, planned),
                on_hash=printer.hashes,
                command=command_of(config, set_ or ()),
                accept_held=accept_held or (),
                reason=reason,
            )
        seconds = time.monotonic() - started
        if as_json:
            print_json(cycle_json(cycle, seconds))
            if cycle.is_refused:
                raise typer.Exit(RefusedError.exit_code)
            return
        if cycle.outcome is not None:
            show_outcome(console, cycle.outcome, seconds)
        for record in cycle.held:
            _say(console, f"held: {record['shard']} ({record['sha256'][:8]}): {record['reason']}")
        if cycle.is_refused:
            raise RefusedError(cycle.sentence)
        _say(console, cycle.sentence)


@app.command("accept-reference")
def accept(
    target: Annotated[
        str, typer.Argument(metavar="NAME|CONFIG", help="a config, or a model for its champion's")
    ],
    reason: Reason = "accepted",
    root: Annotated[str, typer.Option(help="the storage root of a model's name")] = "runs",
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Judge a model by the present data set and extractor from now on; score its champion again."""
    console = make_console(stderr=as_json)
    printer = EventPrinter(console)
    with errors_to_exit_codes(as_json):
        _refuse_torchrun()
        if target.endswith(".toml"):
            config = load_config(target, set_ or ())
        else:
            config = config_of_champion(open_storage(root), target, set_ or ())
        with printer.live(), _stdout_kept_for_json(as_json):
            accepted = accept_reference(
                config, observer=printer.observe, reason=reason, on_hash=printer.hashes
            )
        if as_json:
            print_json(accepted_json(accepted))
        else:
            _show_accepted(console, config.name, accepted)


def cycle_json(cycle: Cycle, seconds: float) -> dict[str, Any]:
    """What a call of `retrain` did.

    Args:
        cycle: its outcome.
        seconds: that it took.
    """
    done = {} if cycle.outcome is None else outcome_json(cycle.outcome, seconds)
    return {
        **done,
        "seconds": seconds,
        "state": cycle.state,
        "sentence": cycle.sentence,
        "exit_code": RefusedError.exit_code if cycle.is_refused else 0,
        "cycle": cycle.number,
        "version": cycle.version,
        "new": list(cycle.new),
        "held": [dict(record) for record in cycle.held],
        "unjudged": list(cycle.unjudged),
    }


def accepted_json(accepted: Accepted) -> dict[str, Any]:
    """What `accept-reference` did.

    Args:
        accepted: its outcome.
    """
    return {
        "evaluation": accepted.evaluation,
        "is_new": accepted.is_new,
        "champion": accepted.version,
        "score": accepted.score,
    }


def _show_accepted(console: Console, name: str, accepted: Accepted) -> None:
    show_score(console, accepted.score)
    number, facts = accepted.evaluation["number"], accepted.evaluation["facts"]
    word = "pins" if accepted.is_new else "pinned already"
    _say(
        console,
        f"{name} {word} evaluation {number}: {facts['reference_count']:,} images of the "
        f"{facts['reference_split']} split, {facts['extractor']}. Version {accepted.version}, the "
        "champion, has its score under it.",
    )


def _refuse_torchrun() -> None:
    if torchrun_world() is not None:
        raise ConfigError("retrain and accept-reference start Ray. Use them without torchrun.")


def _stdout_kept_for_json(as_json: bool) -> contextlib.redirect_stdout[Any]:
    """Ray prints to stdout when a worker dies, where a program expects one JSON object."""
    return contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)
