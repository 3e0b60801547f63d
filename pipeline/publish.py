"""Puts the pages of a run where the run is; the steps' own copies stay with the steps."""

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.runs import read_run
from pipeline.storage import Storage
from pipeline.workflow import read_artifact, read_manifest

UNKNOWN_COMMAND = "run CONFIG"  # where the path of the config is not known
SEARCH_PAGE, SEARCH_FILES = "tune.html", ("tune.json", "trials.csv")


def training_command(overrides: Sequence[str], command: str = UNKNOWN_COMMAND) -> str:
    """The command that trains what a search recommends, as it can be typed into a shell.

    Args:
        overrides: of the recommended config.
        command: what runs the config that the search was made with, after `raydiffusion`.
    """
    given = [part for text in (*overrides, "tune.enabled=false") for part in ("--set", text)]
    return f"raydiffusion {command} {shlex.join(given)}"


def publish_report(storage: Storage, run: str, manifest: Mapping[str, Any], is_new: bool) -> str:
    """The report of a training or an evaluation; returns where it is."""
    path = f"runs/{run}/report.html"
    if is_new or not storage.exists(path):
        storage.replace(path, read_artifact(storage, manifest, "report.html"))
    return f"{storage.uri}/{path}"


def publish_search(storage: Storage, run: str, manifest: Mapping[str, Any], command: str) -> str:
    """The page of a search, its JSON and its table beside it; returns where the page is.

    Args:
        storage: the root.
        run: its name.
        manifest: of the step `tune`.
        command: as of `training_command`.
    """
    page = read_artifact(storage, manifest, SEARCH_PAGE).decode()
    unknown, known = (html.escape(f"raydiffusion {x} ") for x in (UNKNOWN_COMMAND, command))
    page = page.replace(unknown, known)  # the step's own knows no path
    for name in SEARCH_FILES:
        storage.replace(f"runs/{run}/{name}", read_artifact(storage, manifest, name))
    storage.replace(f"runs/{run}/{SEARCH_PAGE}", page.encode())
    return f"{storage.uri}/runs/{run}/{SEARCH_PAGE}"


def publish_again(storage: Storage, run: str) -> str:
    """Writes the page of a run's search anew; returns where it is.

    Raises:
        ConfigError: there is no such run, or it has no finished search.
    """
    document = read_run(storage, run)
    directory = document["directories"].get("tune")
    manifest = None
    if directory is not None:
        manifest = read_manifest(storage, "tune", directory.rsplit("/", 1)[-1])
    if manifest is None:
        raise ConfigError(
            f"The run {run} has no finished search. Run `raydiffusion tune` with its config, or "
            "give a config to `report`."
        )
    return publish_search(storage, run, manifest, document.get("command") or UNKNOWN_COMMAND)
