"""What `drill` prints: what the strike cost, as lines or as one JSON object."""

import dataclasses
import json

import typer

from jobs.console import make_console
from pipeline.drill import Drill, Kind, run_drill
from pipeline.settings import Config


def rehearse(config: Config, kind: Kind, *, num_steps: int, outage_s: float, as_json: bool) -> None:
    """Runs the drill, prints what came of it, and ends as the training did.

    Raises:
        RaydiffusionError: the training failed, before the strike or for good.
        typer.Exit: likewise, where the JSON has said it all.
    """
    console = make_console(stderr=as_json)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    done = run_drill(config, kind, num_steps=num_steps, outage_s=outage_s, tell=say)
    if as_json:
        print(json.dumps(_to_json(done), indent=1))
        if done.error is not None:
            raise typer.Exit(done.exit_code)
        return
    for line in _lines(done):
        say(line)
    if done.error is not None:
        raise done.error


def _to_json(done: Drill) -> dict[str, object]:
    return {
        "kill": done.kind,
        "ended_well": done.error is None,
        "exit_code": done.exit_code,
        "error": str(done.error) if done.error is not None else None,
        "num_steps": done.num_steps,
        "checkpoint_every": done.checkpoint_every,
        **dataclasses.asdict(done.recovery),
        "seconds": done.seconds,
    }


def _lines(done: Drill) -> list[str]:
    found = done.recovery
    lost, seconds = found.steps_lost, found.seconds_to_recover
    if found.resumed_from is not None:
        went_on = f"went on from the checkpoint at step {found.resumed_from:,}"
    else:
        went_on = "the same processes went on" if done.error is None else "nothing went on"
    until = "checkpoint" if found.resumed_from is None else "step"
    return [
        f"struck after step {found.struck_at_step:,} of {done.num_steps:,}; {went_on}",
        "steps lost          "
        + (f"{lost:,}, " if lost is not None else "")
        + f"with a checkpoint every {done.checkpoint_every:,}",
        "seconds to recover  "
        + (f"{seconds:.1f}, to the first new {until}" if seconds is not None else "never"),
        f"longest pause       {found.longest_pause_s:.1f} s between two steps",
        f"workers             {found.workers_before} before, {found.workers_after} after",
        f"ended               {'well' if done.error is None else 'with an error'}, "
        f"after {done.seconds:.0f} s in all",
    ]
