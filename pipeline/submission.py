"""Submitting a verb and a config as a job: what is sent, what it is called, once while it runs.

A job's id is `<name>-<verb>-<hash>-<attempt>`, the hash of everything that is sent. So the same
command finds the job that runs, and begins another attempt when that has ended.
"""

import hashlib
import json
import re
import shlex
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.cluster_jobs import Job
from pipeline.config import is_secret
from pipeline.errors import ConfigError
from pipeline.packing import Package
from pipeline.settings import Config
from pipeline.storage import LocalStorage, open_storage

VERBS = (
    "run", "retrain", "accept-reference",
    "preprocess", "train", "tune", "evaluate", "report", "doctor",
)  # fmt: skip
PYTHON = "python"  # on the cluster, as its PATH finds it
SUBMITTED_AS = "RAYDIFFUSION_SUBMITTED_AS"  # in the job: what would submit `run` in its place
# The shell that starts the job knows the address from Ray.
_JOIN = '--set cluster.address="$RAY_ADDRESS"'


class Cluster(Protocol):
    """What submitting asks of a cluster."""

    @property
    def address(self) -> str: ...

    def jobs(self) -> list[Job]: ...

    def submit(
        self, job_id: str, *, entrypoint: str, directory: Path, metadata: Mapping[str, str]
    ) -> bool: ...


@dataclass(frozen=True)
class Submission:
    """A command for a cluster, with its files."""

    name: str  # the job's id without its attempt
    entrypoint: str
    package: Package
    metadata: Mapping[str, str]


def make_submission(
    config: Config,
    package: Package,
    verb: str,
    *,
    arguments: Sequence[str] = (),
    settings: Sequence[str] = (),
    python: str = PYTHON,
    submitted_as: str,
) -> Submission:
    """Says what is to be sent.

    Args:
        config: the whole config.
        package: its files.
        verb: of this program.
        arguments: what follows the config on the command line.
        settings: from `settings_on_cluster`.
        python: the interpreter there.
        submitted_as: what submits `run` with this config, as typed after `raydiffusion`. It is no
            part of the name: the same job may be asked for in other words.
    """
    words = [python, "-m", "jobs", verb, package.config, *arguments]
    for setting in settings:
        words += ["--set", setting]
    command = f"{shlex.join(words)} {_JOIN}"
    sha256 = hashlib.sha256(f"{package.sha256()}\0{command}".encode()).hexdigest()
    name = f"{config.name}-{verb}-{sha256[:8]}"
    metadata = {"name": config.name, "verb": verb, "config": package.config, "sha256": sha256}
    known = shlex.join(["env", f"{SUBMITTED_AS}={submitted_as}"])
    return Submission(name, f"exec {known} {command}", package, metadata)


def refuse_webhooks(path: Path, overrides: Sequence[str]) -> None:
    """Refuses to send a webhook's URL: a job's files and command are seen by all of the cluster.

    Args:
        path: of the config's file, which is sent as it is.
        overrides: `section.key=value`, which are part of the command.

    Raises:
        ConfigError: a receiver of `notify` holds a URL, there or here.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8")).get("notify", {})
    told = {f"notify.{key} in {path}": json.dumps(value) for key, value in table.items()}
    told |= {f"--set {text.partition('=')[0]}": text for text in overrides if is_secret(text)}
    if found := [where for where, text in told.items() if "://" in text]:
        raise ConfigError(
            f"{' and '.join(found)} {'have URLs' if len(found) > 1 else 'has a URL'}, which all "
            "who may look at the cluster's jobs would see. Write 'env:NAME', or have a command "
            "read the variable NAME, and set it in the environment in which Ray's head is started."
        )


def settings_on_cluster(
    config: Config, package: Package, *, address: str, is_here: bool, shares_paths: bool
) -> list[str]:
    """Settings with which the config means on the cluster what it means here.

    Args:
        config: the whole config.
        package: its files.
        address: of the cluster, for the sentence.
        is_here: whether all of the cluster is on this machine.
        shares_paths: whether its nodes have the same files at the same paths, as its user says.

    Raises:
        ConfigError: it names paths of this machine, and the cluster is elsewhere.
    """
    local = {}
    storage = open_storage(config.storage.root)
    if isinstance(storage, LocalStorage):
        local["storage.root"] = storage.uri
    sources = [s for s in config.data.sources if "://" not in s or s.startswith("file://")]
    if sources:
        local["data.sources"] = sources[0] + (", ..." if len(sources) > 1 else "")
    if local and not (is_here or shares_paths):
        named = " and ".join(f"{key} = {value}" for key, value in local.items())
        many = len(local) > 1 or len(sources) > 1
        raise ConfigError(
            f"{named} {'are paths' if many else 'is a path'} of this machine, and the cluster at "
            f"{address} is not on it alone. Put {'them' if many else 'it'} where every node "
            "reaches it, as s3://bucket/path, or add --shared-paths if all nodes have the same "
            "files at the same paths."
        )
    settings = []
    if "storage.root" in local:
        settings.append(f"storage.root={local['storage.root']}")
    if sources:
        sources_text = json.dumps(config.data.sources, ensure_ascii=False)
        settings.append(f"data.sources={sources_text}")
    if package.weights is not None:
        settings.append(f"features.weights={package.weights}")
    return settings


def submit_or_find(cluster: Cluster, submission: Submission) -> tuple[str, bool]:
    """The id of the job of this command that runs, and whether it was submitted just now.

    Two that submit the same at once get the same job: the id is created by one of them.

    Args:
        cluster: where.
        submission: what.
    """
    with tempfile.TemporaryDirectory(prefix="raydiffusion-job-") as directory:
        submission.package.stage(Path(directory))
        while True:
            attempts = {
                number: job
                for job in cluster.jobs()
                if (number := attempt_of(job.id, submission.name)) is not None
            }
            latest = max(attempts, default=0)
            if latest and not attempts[latest].has_ended:
                return attempts[latest].id, False
            job_id = f"{submission.name}-{latest + 1}"
            if cluster.submit(
                job_id,
                entrypoint=submission.entrypoint,
                directory=Path(directory),
                metadata=submission.metadata,
            ):
                return job_id, True  # otherwise another took the number: look again


def attempt_of(job_id: str, name: str) -> int | None:
    """The number of the attempt that a job of that name is; None where it is no such job."""
    found = re.fullmatch(re.escape(name) + r"-([1-9]\d*)", job_id)
    return int(found[1]) if found else None
