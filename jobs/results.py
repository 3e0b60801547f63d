"""What commands print when they are done, for people and as JSON."""

import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.scores import show_score
from pipeline.driver import Outcome, Plan


def show_outcome(console: Console, outcome: Outcome, seconds: float) -> None:
    """Prints what a command did."""
    if outcome.plan.is_cached:
        console.print(f"Everything was there already ({seconds:.1f} s).")
    else:
        console.print(f"Finished in {seconds:.0f} s.")
    if "evaluate" in outcome.manifests:
        score = outcome.manifests["evaluate"]["metrics"]
        show_score(console, score)
    if "promote" in outcome.manifests:
        promotion = outcome.manifests["promote"]["metrics"]
        word = "promoted" if promotion["promoted"] else "not promoted"
        console.print(
            f"version {promotion['version']} {word}: {promotion['reason']}",
            soft_wrap=True,
        )
    if outcome.search:
        console.print(f"search: {outcome.search}", soft_wrap=True)
    if outcome.report:
        console.print(f"report: {outcome.report}", soft_wrap=True)


def show_runs(console: Console, uri: str, documents: list[dict[str, Any]]) -> None:
    """Prints the runs below a storage root."""
    if not documents:
        console.print(f"There are no runs below {uri}.", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "outcome", "started", "steps"):
        table.add_column(heading)
    for document in documents:
        last = document["executions"][-1]
        done = sum(s["state"] in ("finished", "cached") for s in last["steps"].values())
        table.add_row(
            document["run"], last["outcome"], _local_time(last["started"]),
            f"{done} of {len(last['steps'])}",
        )  # fmt: skip
    console.print(table)


def show_run(console: Console, document: dict[str, Any]) -> None:
    """Prints what a run did."""
    last = document["executions"][-1]
    console.print(
        f"run {document['run']}: {last['outcome']}, started {_local_time(last['started'])}, "
        f"{len(document['executions'])} execution(s)",
        soft_wrap=True,
    )
    if document["live"]:
        holder = document["live"]
        console.print(f"process {holder['pid']} on {holder['host']} is working on it")
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "state", "seconds", "because"):
        table.add_column(heading, overflow="fold")
    for name, step in last["steps"].items():
        seconds = f"{step['seconds']:.1f}" if "seconds" in step else ""
        table.add_row(name, step["state"], seconds, step.get("error") or step["reason"])
    console.print(table)
    if progress := document["progress"]:
        console.print(
            f"training is at step {progress['global_step']:,} of {progress['num_steps']:,}, "
            f"{progress['images_per_s']:.0f} images/s, loss {progress['loss']:.4f}, "
            f"{progress['seconds_left']:.0f} s left",
            soft_wrap=True,
        )
    if cycle := document["cycle"]:
        outcome = cycle["outcome"]
        said = outcome["sentence"] if outcome else "not over; `retrain` goes on with it"
        text = f"cycle {cycle['number']} of retraining: {said}"
        console.print(text, soft_wrap=True)


def exchanged_json(exchanged: Any) -> dict[str, Any]:
    """What an import or export did."""
    return {
        "output": exchanged.output,
        "num_parameters": exchanged.num_parameters,
        "notes": exchanged.notes,
        **exchanged.document.model_dump(mode="json"),
    }


def plan_json(planned: Plan) -> dict[str, Any]:
    """What would happen to each step."""
    return {
        "run": planned.run,
        "missing_shards": planned.missing_shards,
        "steps": [
            {"step": p.step.name, "action": p.action, "reason": p.reason, "key": p.key}
            for p in planned.steps
        ],
    }


def outcome_json(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What a command did."""
    return {
        **plan_json(outcome.plan),
        "seconds": seconds,
        "report": outcome.report,
        "search": outcome.search,
        "metrics": {name: manifest["metrics"] for name, manifest in outcome.manifests.items()},
    }


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def print_json(document: dict[str, Any]) -> None:
    """Prints the one JSON object of a command."""
    print(json.dumps(document, indent=1), flush=True)  # a pipe that is closed is met here
