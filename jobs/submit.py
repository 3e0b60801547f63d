"""The verbs of jobs on a cluster: `submit`, `attach`, `stop`, `jobs`."""

import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.console import make_console
from jobs.exit_codes import errors_to_exit_codes
from jobs.options import AsJson
from jobs.results import print_json
from jobs.tune import command_of
from pipeline.cluster_jobs import DEFAULT_ADDRESS, Job, JobServer
from pipeline.config import load_config
from pipeline.errors import ClusterError, ConfigError
from pipeline.following import follow
from pipeline.packing import make_package
from pipeline.storage import in_bytes
from pipeline.submission import (
    PYTHON,
    VERBS,
    make_submission,
    refuse_webhooks,
    settings_on_cluster,
    submit_or_find,
)

PATIENCE_S = 300.0
STOP_TIMEOUT_S = 60.0
STOP_POLL_S = 0.5

app = typer.Typer()

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="of the cluster's dashboard, http://HEAD:8265"
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="of a job")]
Patience = Annotated[
    float, typer.Option(min=0, help="seconds for which the cluster may give no answer")
]


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[
        list[str],
        typer.Argument(metavar="VERB CONFIG [OPTIONS]", help=f"one of {', '.join(VERBS)}"),
    ],
    address: Address = DEFAULT_ADDRESS,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="do not follow the job")] = False,
    include: Annotated[
        list[Path] | None, typer.Option(help="a file or directory to send along; repeatable")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="a pattern of names to leave out; repeatable")
    ] = None,
    shared_paths: Annotated[
        bool,
        typer.Option("--shared-paths", help="all nodes have the same files at the same paths"),
    ] = False,
    python: Annotated[str, typer.Option(help="the interpreter on the cluster")] = PYTHON,
    patience: Patience = PATIENCE_S,
    as_json: AsJson = False,
) -> None:
    """Run a verb as a job on a Ray cluster, follow its log, and end with its exit code.

    The same command while it runs follows the job there is. Ctrl-C leaves the job alone.
    """
    interrupted = (
        "Interrupted. If the job was submitted already, it goes on: the same command follows it, "
        f"and raydiffusion jobs --address {address} lists it."
    )
    with errors_to_exit_codes(as_json, on_interrupt=interrupted):
        verb, path, arguments = _split(command)
        overrides = _overrides(arguments)
        config = load_config(path, overrides)
        refuse_webhooks(path, overrides)
        package = make_package(config, path, includes=include or (), excludes=exclude or ())
        server = JobServer(address)
        settings = settings_on_cluster(
            config,
            package,
            address=server.address,
            is_here=server.is_here(),
            shares_paths=shared_paths,
        )
        options = ["--address", server.address, *(["--shared-paths"] if shared_paths else [])]
        options += [part for each in include or () for part in ("--include", str(each))]
        options += [part for each in exclude or () for part in ("--exclude", each)]
        options += ["--python", python] if python != PYTHON else []
        submission = make_submission(
            config, package, verb,
            arguments=arguments, settings=settings, python=python,
            submitted_as=f"submit {shlex.join(options)} {command_of(path, overrides)}",
        )  # fmt: skip
        job_id, is_new = submit_or_find(server, submission)
        console = make_console(stderr=as_json)
        size = f"{len(package.files)} files, {in_bytes(package.num_bytes)}"
        done = f"submitted ({size})" if is_new else "runs already: following it"
        _say(console, f"job {job_id} {done}")
        if not no_wait:
            _follow(server, job_id, patience, as_json, is_new=is_new)
            return
        _say(console, f"Follow it: raydiffusion attach {job_id} --address {server.address}")
        _say(console, f"End it: raydiffusion stop {job_id} --address {server.address}")
        if as_json:
            print_json({**_job_json(server.job(job_id)), "is_new": is_new})


@app.command()
def attach(
    job_id: JobId,
    address: Address = DEFAULT_ADDRESS,
    patience: Patience = PATIENCE_S,
    as_json: AsJson = False,
) -> None:
    """Follow a job's log from its beginning, and end with its exit code."""
    with errors_to_exit_codes(as_json, on_interrupt="Interrupted."):
        server = JobServer(address)
        server.job(job_id)  # the sentence for an id that is not known
        _follow(server, job_id, patience, as_json, is_new=False)


@app.command()
def stop(job_id: JobId, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """End a job. Finished steps and checkpoints are kept."""
    with errors_to_exit_codes(as_json, on_interrupt="Interrupted. The job may end all the same."):
        server = JobServer(address)
        job = server.job(job_id)
        had_ended = job.has_ended
        if not had_ended:
            server.stop(job_id)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not (job := server.job(job_id)).has_ended:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"The job {job_id} has not ended {STOP_TIMEOUT_S:.0f} s after it was told to. "
                    "Look at it in the cluster's dashboard."
                )
            time.sleep(STOP_POLL_S)
        if as_json:
            print_json(_job_json(job))
        else:
            word = "had ended before" if had_ended else "ended"
            _say(make_console(), f"job {job_id} {word}: {job.status.lower()}")


@app.command()
def jobs(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Print the jobs that the cluster knows."""
    with errors_to_exit_codes(as_json):
        found = JobServer(address).jobs()
        if as_json:
            print_json({"jobs": [_job_json(job) for job in found]})
        elif not found:
            _say(make_console(), f"The cluster at {address} knows no jobs.")
        else:
            _show_jobs(make_console(), found)


def _split(command: Sequence[str]) -> tuple[str, Path, list[str]]:
    """The verb, the config's path, and what follows them."""
    verb, *rest = command
    if verb not in VERBS:
        raise ConfigError(f"submit takes one of {', '.join(VERBS)}, got {verb!r}. Choose one.")
    if not rest or rest[0].startswith("-"):
        raise ConfigError(
            f"submit {verb} needs a config after the verb. Write for example "
            f"raydiffusion submit --address http://HEAD:8265 {verb} my.toml."
        )
    return verb, Path(rest[0]), list(rest[1:])


def _overrides(arguments: Sequence[str]) -> list[str]:
    """What `--set` sets; the other arguments are the verb's own."""
    found, words = [], iter(arguments)
    for word in words:
        if word == "--set":
            if (value := next(words, None)) is None:
                raise ConfigError("--set takes section.key=value. Write it after --set.")
            found.append(value)
        elif word.startswith("--set="):
            found.append(word.removeprefix("--set="))
    return found


def _follow(
    server: JobServer, job_id: str, patience_s: float, as_json: bool, *, is_new: bool
) -> None:
    """Passes the log on; leaves with the job's exit code."""
    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    detached = (
        f"Detached; the job goes on. Follow it again: raydiffusion attach {job_id} --address "
        f"{server.address}\nEnd it: raydiffusion stop {job_id} --address {server.address}"
    )
    with errors_to_exit_codes(as_json, on_interrupt=detached):
        job = asyncio.run(follow(server, job_id, write=write, tell=tell, patience_s=patience_s))
        if job.exit_code is None:
            raise ClusterError(
                f"The job {job_id} failed outside of its process: {job.message.strip()}. Submit it "
                "again; finished work is kept."
            )
        if as_json:
            print_json({**_job_json(job), "is_new": is_new})
        else:
            _say(make_console(), f"job {job_id} {job.status.lower()}, exit code {job.exit_code}")
    raise typer.Exit(job.exit_code)


def _job_json(job: Job) -> dict[str, Any]:
    return asdict(job) | {"exit_code": job.exit_code}


def _show_jobs(console: Console, found: Sequence[Job]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("job", no_wrap=True)  # to be copied
    for heading in ("status", "exit code", "started", "seconds", "does"):
        table.add_column(heading, overflow="fold")
    for job in found:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        seconds = (job.ended or time.time()) - (job.started or time.time())
        what = " ".join(job.metadata.get(key, "") for key in ("verb", "config")).strip()
        table.add_row(
            job.id, job.status.lower(), "" if job.exit_code is None else str(job.exit_code),
            started if job.started else "", f"{seconds:.0f}", what or job.entrypoint,
        )  # fmt: skip
    console.print(table)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)
