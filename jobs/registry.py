"""The verbs of the registry: `models`, `promote`, `rollback`, `lineage`."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.console import make_console
from jobs.exit_codes import errors_to_exit_codes
from jobs.options import AsJson
from jobs.results import print_json
from pipeline.holding import held_shards
from pipeline.registry import Registry, list_models, open_registry
from pipeline.storage import open_storage

app = typer.Typer()

Name = Annotated[str, typer.Argument(metavar="NAME", help="of a model: `name` of its config")]
Root = Annotated[str, typer.Option(help="the storage root")]
Reason = Annotated[str, typer.Option(help="kept with the record, for those who ask later")]


@app.command()
def models(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="its versions alone")] = "",
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Print the models below a storage root with their champions, or the versions of one."""
    with errors_to_exit_codes(as_json):
        storage = open_storage(root)
        if name:
            _show_model(open_registry(storage, name), as_json)
            return
        found = [_summary(Registry(storage, each)) for each in list_models(storage)]
        if as_json:
            print_json({"models": found})
        elif not found:
            _say(f"There are no models below {storage.uri}.")
        else:
            headings = ("model", "versions", "champion", "score", "since", "by")
            rows = [
                (
                    m["name"], str(m["versions"]), *_champion_cells(m["champion"], m["promotion"])
                )
                for m in found
            ]  # fmt: skip
            _print_table(headings, rows)


@app.command()
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="its number")],
    reason: Reason,
    after: Annotated[
        int | None,
        typer.Option(metavar="VERSION", help="only if the champion is this version still"),
    ] = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Make a version of a model its champion."""
    with errors_to_exit_codes(as_json):
        registry = open_registry(open_storage(root), name)
        _say_promotion(registry, registry.promote(version, reason, replacing=after), as_json)


@app.command()
def rollback(
    name: Name,
    reason: Reason = "",
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Make the champion before the champion the champion again."""
    with errors_to_exit_codes(as_json):
        registry = open_registry(open_storage(root), name)
        _say_promotion(registry, registry.rollback(reason or None), as_json)


@app.command()
def lineage(
    name: Name,
    version: Annotated[
        int | None,
        typer.Argument(
            metavar="[VERSION]",
            help="its number; if left out the champion, or the latest where there is none",
        ),
    ] = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Print what a version of a model was made of, and what became of it."""
    from pipeline.lineage import ancestors

    with errors_to_exit_codes(as_json):
        registry = open_registry(open_storage(root), name)
        versions = registry.versions()
        champion = registry.champion() or versions[-1]
        document = champion if version is None else registry.version(version)
        parents = ancestors(document, versions)
        promotions = [p for p in registry.promotions() if p["version"] == document["number"]]
        if as_json:
            print_json({"version": document, "ancestors": parents, "promotions": promotions})
        else:
            _show_lineage(name, document, parents, promotions)


def _summary(registry: Registry) -> dict[str, Any]:
    promotions = registry.promotions()
    return {
        "name": registry.name,
        "versions": len(registry.versions()),
        "champion": registry.champion(),
        "promotion": promotions[-1] if promotions else None,
    }


def _show_model(registry: Registry, as_json: bool) -> None:
    versions, promotions = registry.versions(), registry.promotions()
    champion = promotions[-1]["version"] if promotions else None
    if as_json:
        print_json({
            "name": registry.name, "champion": champion, "versions": versions,
            "promotions": promotions, "evaluations": registry.evaluations(),
            "held": held_shards(registry),
        })  # fmt: skip
        return
    rows = [
        (
            f"{v['number']}{' *' if v['number'] == champion else ''}", _score(v["score"]),
            _steps(v), str(v.get("parent") or ""), _local_time(v["created"]),
        )
        for v in versions
    ]  # fmt: skip
    _print_table(("version", "score", "steps", "continues", "made"), rows)
    _say("* the champion")
    for p in promotions:
        word = "rolled back to" if p.get("kind") == "rollback" else "promoted"
        _say(f"{_local_time(p['time'])} {p['by']} {word} version {p['version']}: {p['reason']}")
    for evaluation in registry.evaluations():
        facts = evaluation["facts"]
        _say(
            f"{_local_time(evaluation['time'])} {evaluation['by']} pinned evaluation "
            f"{evaluation['number']} ({facts['reference_count']} images of the "
            f"{facts['reference_split']} split, {facts['extractor']}): {evaluation['reason']}"
        )
    for record in held_shards(registry):
        _say(f"held: {record['shard']} ({record['sha256'][:8]}): {record['reason']}")


def _show_lineage(
    name: str,
    document: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]],
    promotions: Sequence[Mapping[str, Any]],
) -> None:
    score, protocol = document["score"], document["score"]["protocol"]
    rows = {
        "version": f"{document['number']} of {name}, made {_local_time(document['created'])}",
        "score": f"{_score(score)} with {protocol['num_samples']:,} samples against "
        f"{protocol['reference_count']:,} of the {protocol['reference_split']} split",
        "weights": document["weights"],
        "data": f"steps/preprocess/{document['lineage']['preprocess']}",
        "training": f"steps/train/{document['lineage']['train']}",
        "evaluation": f"steps/evaluate/{document['lineage']['evaluate']}",
    }
    if "code" in document:
        code = document["code"]
        commit = f", commit {code['commit']}" if code["commit"] else ""
        rows["training"] += f", {_steps(document)} steps"
        rows["code"] = f"{code['version'] or 'no version'}, modules {code['sha256']}{commit}"
    chain = ", ".join(f"version {p['number']} ({_steps(p)} steps)" for p in parents)
    rows["continues"] = chain or "none: it began anew"
    for heading, text in rows.items():
        _say(f"{heading:10} {text}")
    for p in promotions:
        word = "rolled back to" if p.get("kind") == "rollback" else "promoted"
        _say(f"{word:10} {_local_time(p['time'])} by {p['by']}: {p['reason']}")
    if not promotions:
        _say("promoted   never")


def _say_promotion(registry: Registry, promotion: Mapping[str, Any], as_json: bool) -> None:
    replaced = registry.replaced(promotion)
    if as_json:
        print_json({**promotion, "replaced": replaced})
        return
    _say(
        f"version {promotion['version']} is the champion of {registry.name} (promotion "
        f"{promotion['number']} by {promotion['by']}: {promotion['reason']})"
    )
    if replaced is not None:
        _say(
            f"it replaces version {replaced['version']}, promoted by {replaced['by']} at "
            f"{_local_time(replaced['time'])}: {replaced['reason']}"
        )


def _champion_cells(
    champion: Mapping[str, Any] | None, promotion: Mapping[str, Any] | None
) -> tuple[str, str, str, str]:
    if champion is None or promotion is None:
        return "none", "", "", ""
    score = _score(champion["score"])
    return str(champion["number"]), score, _local_time(promotion["time"]), promotion["by"]


def _score(score: Mapping[str, Any]) -> str:
    return f"{score['metric']} {score['value']:.3f}"


def _steps(version: Mapping[str, Any]) -> str:
    return f"{version['checkpoint']['global_step']:,}" if "checkpoint" in version else ""


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    make_console().print(table)


def _say(text: str) -> None:
    make_console().print(text, soft_wrap=True)
