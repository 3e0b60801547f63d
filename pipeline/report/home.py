"""The home page of a storage root: its models, searches and runs, with links to their pages."""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError, StorageError
from pipeline.garbage import check_root
from pipeline.lineage import is_made_by
from pipeline.registry import ROLLBACK, Registry, list_models
from pipeline.report.page import render
from pipeline.report.plots import score_history
from pipeline.runs import list_runs, read_run
from pipeline.storage import Storage
from pipeline.tune.experiment import summarise
from pipeline.workflow import hash_json

PAGE = "index.html"
RUNS_SHOWN, VERSIONS_SHOWN = 200, 50  # the latest
_OURS = re.compile(rb'<p class="sub">\d+ models?, \d+ search(es)?, \d+ runs? &middot; ')
PAGES = {"report.html": "report", "tune.html": "search"}


def write_home(storage: Storage) -> str:
    """Writes `index.html` into a storage root; returns where it is.

    Raises:
        ConfigError: there is no storage root, or an `index.html` that is not ours.
        StorageError: a record cannot be read, or the page not written.
    """
    check_root(storage)
    with contextlib.suppress(FileNotFoundError):
        if not _OURS.search(storage.read(PAGE)):
            raise ConfigError(
                f"{storage.uri}/{PAGE} is no home page of raydiffusion, and is not overwritten. "
                "Move it elsewhere."
            )
    storage.replace(PAGE, make_home(storage).encode())
    return f"{storage.uri}/{PAGE}"


def make_home(storage: Storage) -> str:
    """Renders the home page.

    Args:
        storage: the root.
    """
    documents = [read_run(storage, name) for name in reversed(list_runs(storage))]
    pages = {d["run"]: set(storage.list(f"runs/{d['run']}")) for d in documents[:RUNS_SHOWN]}
    return render(
        "home.html.jinja",
        root=storage.uri,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        models=[_describe_model(Registry(storage, n), documents) for n in list_models(storage)],
        searches=[
            search
            for document in documents[:RUNS_SHOWN]
            if "tune.json" in pages[document["run"]]
            and (search := _describe_search(storage, document["run"])) is not None
        ],
        runs=[_describe_run(d, pages[d["run"]]) for d in documents[:RUNS_SHOWN]],
        num_runs=len(documents),
    )


def _describe_model(registry: Registry, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    versions, promotions = registry.versions(), registry.promotions()
    champion = promotions[-1]["version"] if promotions else None
    protocols: dict[str, int] = {}
    points: list[tuple[float, float, int]] = []
    scores: dict[int, dict[int, float]] = {}  # by version, then protocol
    for number, seconds, score in _all_scores(registry, versions):
        key = hash_json([score["metric"], score["protocol"]])
        protocol = protocols.setdefault(key, len(protocols))
        points.append((seconds, score["value"], protocol))
        scores.setdefault(number, {})[protocol] = score["value"]
    rows = [
        {
            "number": version["number"],
            "metric": version["score"]["metric"],
            "value": version["score"]["value"],
            "protocol": next(iter(scores[version["number"]])) + 1,
            "samples": version["score"]["protocol"].get("num_samples"),
            "made": _utc(version["created"]),
            "steps": version.get("checkpoint", {}).get("global_step"),
            "parent": version.get("parent"),
            "run": _run_with_report(registry.storage, version, runs),
        }
        for version in versions
    ]
    reigns = [(p["time"], p["version"], scores[p["version"]]) for p in promotions]
    return {
        "name": registry.name,
        "champion": next((row for row in rows if row["number"] == champion), None),
        "versions": rows[::-1][:VERSIONS_SHOWN],
        "num_versions": len(rows),
        "num_protocols": len(protocols),
        "promotions": [
            {
                "time": _utc(p["time"]),
                "by": p["by"],
                "word": "rolled back to" if p.get("kind") == ROLLBACK else "promoted",
                "version": p["version"],
                "reason": p["reason"],
            }
            for p in reversed(promotions)
        ],
        "history": score_history(points, reigns, rows[-1]["metric"]),
    }


def _run_with_report(
    storage: Storage, version: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> str | None:
    """The run that made a version, if its report is there."""
    made = [d["run"] for d in runs if is_made_by(version, d["identities"])]
    return next((run for run in made if storage.exists(f"runs/{run}/report.html")), None)


def _all_scores(
    registry: Registry, versions: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, float, Mapping[str, Any]]]:
    """Version, time and score: each version's own, then those that it got later."""
    for version in versions:
        yield version["number"], version["created"], version["score"]
    for record in registry.records("scores"):
        yield record["version"], record["time"], record["score"]


def _describe_search(storage: Storage, run: str) -> dict[str, Any] | None:
    try:
        document = json.loads(storage.read(f"runs/{run}/tune.json"))
    except FileNotFoundError:  # deleted since it was listed
        return None
    except ValueError as error:
        raise StorageError(
            f"{storage.uri}/runs/{run}/tune.json is no JSON. Write it again with `raydiffusion "
            f"report {run} --root {storage.uri}`."
        ) from error
    return {
        "run": run,
        "name": document["name"],
        "trials": document["counts"]["trials"],
        "verdict": summarise(document),
        "overrides": document["overrides"],
    }


def _describe_run(document: Mapping[str, Any], pages: set[str]) -> dict[str, Any]:
    last = document["executions"][-1]
    failed = [step["error"] for step in last["steps"].values() if "error" in step]
    return {
        "run": document["run"],
        "name": document["name"],
        "verb": _verb(last),
        "outcome": last["outcome"],
        "started": _utc(last["started"]),
        "seconds": last["ended"] - last["started"] if last["ended"] else None,
        "executions": len(document["executions"]),
        "error": failed[-1].splitlines()[0] if failed and last["outcome"] == "failed" else None,
        "links": [(PAGES[page], page) for page in PAGES if page in pages],
    }


def _verb(execution: Mapping[str, Any]) -> str:
    """What was asked for, from the last step that was planned."""
    steps = list(execution["steps"])
    if steps[-1] == "report":
        return "run" if "promote" in steps else "evaluate"
    return steps[-1]


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
