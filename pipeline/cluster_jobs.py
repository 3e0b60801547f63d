"""Jobs on a Ray cluster, by the address of its dashboard: submit, look at, stop, list.

Over Ray's own client, with time-outs, and its errors as those of this project. Following a job's
logs is in `following.py`; what a job takes along, in `packing.py`.
"""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ClusterError, ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 30
UPLOAD_TIMEOUT_S = 600
STOPPED_EXIT_CODE = 130
MAX_CHARACTERS = 300  # of what a server says in an error
# With these set, Ray's client would go elsewhere than it is told.
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


class ConnectionLostError(ClusterError):
    """The cluster gave no answer; it may give one later."""


@dataclass(frozen=True)
class Job:
    """What a cluster knows of a job."""

    id: str
    status: Status
    entrypoint: str
    message: str
    driver_exit_code: int | None
    started: float | None  # seconds since the epoch
    ended: float | None
    metadata: Mapping[str, str]

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will happen any more."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def exit_code(self) -> int | None:
        """What a shell would say: 130 when stopped, 128 + n when a signal n ended its process.

        None while it goes on, and where its process never began or vanished.
        """
        match self.status, self.driver_exit_code:
            case "STOPPED", _:
                return STOPPED_EXIT_CODE
            case "SUCCEEDED", _:
                return 0
            case "FAILED", int(code):
                return code if code >= 0 else 128 - code
        return None


class JobServer:
    """The jobs of one cluster.

    Args:
        address: of its dashboard, `http://HEAD:8265`.

    Raises:
        ClusterError: it cannot be reached, or refuses the token.
        ConfigError: the address is not one of a dashboard.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        with self._errors():
            self._client = _make_client(self.address)

    def submit(
        self, job_id: str, *, entrypoint: str, directory: Path, metadata: Mapping[str, str]
    ) -> bool:
        """Submits a job; False, and nothing happens, where there is one of that id.

        Args:
            job_id: of the job.
            entrypoint: its shell command.
            directory: that is sent along, its working directory.
            metadata: that the cluster keeps with it, for everyone to see.
        """
        with self._errors():
            try:
                self._client.submit_job(
                    submission_id=job_id,
                    entrypoint=entrypoint,
                    runtime_env={"working_dir": str(directory)},
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            ConfigError: the cluster knows none of that id.
        """
        with self._errors(job_id):
            return _read(self._client.get_job_info(job_id))

    def jobs(self) -> list[Job]:
        """All that were submitted, the latest last."""
        with self._errors():
            found = [_read(info) for info in self._client.list_jobs() if info.submission_id]
        return sorted(found, key=lambda job: (job.started or 0.0, job.id))

    def stop(self, job_id: str) -> None:
        """Asks a job to end; its process gets SIGTERM, and 3 s later SIGKILL."""
        with self._errors(job_id):
            self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        """All that it printed until now."""
        with self._errors(job_id):
            return self._client.get_job_logs(job_id)

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """What it printed from the beginning, and goes on to print, in parts."""
        with self._errors(job_id):
            async for part in self._client.tail_job_logs(job_id):
                yield part

    def is_here(self) -> bool:
        """Whether every node of the cluster is on this machine, with its files.

        Addresses do not tell: that of a tunnel is local, and a node of any machine may have
        127.0.0.1 or what is our own address in another network.
        """
        from ray.util.state import list_nodes

        with self._errors(), _address_of_its_own():
            nodes: list[Any] = list_nodes(self.address, timeout=ANSWER_TIMEOUT_S)
        alive = {node.node_id for node in nodes if node.state == "ALIVE"}
        return bool(alive) and alive <= _nodes_here()

    @contextlib.contextmanager
    def _errors(self, job_id: str = "") -> Iterator[None]:
        """Errors of Ray's client and of those below it, as sentences."""
        try:
            yield
        except (ClusterError, ConfigError):
            raise
        except ImportError as error:
            raise ClusterError(
                f"Ray's client for jobs is not installed ({error}). Install ray[default]."
            ) from error
        except Exception as error:  # Ray's, requests', aiohttp's
            raise self._translate(error, job_id) from error

    def _translate(self, error: Exception, job_id: str) -> ClusterError | ConfigError:
        text = " ".join(str(error).split())
        status = getattr(error, "status", None) or _status_in(text)
        if status == 401 or "find an authentication token" in text or "no authentication" in text:
            return ClusterError(
                f"The cluster at {self.address} wants a token, and none was sent. Set "
                "RAY_AUTH_MODE=token and put the cluster's token into RAY_AUTH_TOKEN, or into the "
                "file ~/.ray/auth_token."
            )
        if status == 403 or text.startswith("Authentication failed"):
            return ClusterError(
                f"The cluster at {self.address} refuses the token. Put the cluster's own into "
                "RAY_AUTH_TOKEN, or into the file ~/.ray/auth_token."
            )
        if status == 404 and "does not exist" in text and job_id:
            return ConfigError(
                f"The cluster at {self.address} knows no job {job_id}; one that was started anew "
                f"knows none. List those it knows: raydiffusion jobs --address {self.address}."
            )
        if status is not None and 400 <= status < 500:
            return ClusterError(
                f"The cluster at {self.address} refuses the request: {text[:MAX_CHARACTERS]}. "
                "Check that this is the dashboard of a Ray cluster of version 2.60."
            )
        if status is not None:
            return ConnectionLostError(
                f"The cluster at {self.address} cannot answer: {text[:MAX_CHARACTERS]}. See the "
                "dashboard's logs on its head."
            )
        return ConnectionLostError(
            f"The cluster at {self.address} does not answer: "
            f"{text[:MAX_CHARACTERS] or type(error).__name__}. Check the address of the dashboard, "
            "that the cluster is up, and the way to it."
        )


def check_address(address: str) -> str:
    """The address of a dashboard with its scheme.

    Raises:
        ConfigError: it is one of something else.
    """
    scheme, separator, rest = address.rstrip("/").partition("://")
    if not separator:
        scheme, rest = "http", scheme
    if scheme not in ("http", "https") or not rest or rest == "auto" or rest.endswith(":6379"):
        raise ConfigError(
            f"--address takes the address of a cluster's dashboard, got {address!r}. Write "
            "http://HEAD:8265."
        )
    return f"{scheme}://{rest}"


def _nodes_here() -> set[str]:
    """The ids of the Ray nodes whose processes are on this machine and see its files.

    Ray gives each node's raylet its id and the path of its socket. That of one in a container is
    not at that path here.
    """
    import ray  # noqa: F401  # it brings psutil

    import psutil  # isort: skip  # pyright: ignore[reportMissingModuleSource]

    found = set()
    for process in psutil.process_iter(["cmdline"]):
        options = dict(word.partition("=")[::2] for word in process.info["cmdline"] or ())
        if os.access(options.get("--raylet_socket_name", ""), os.F_OK):
            found.add(options.get("--node_id", ""))
    return found


def _make_client(address: str) -> Any:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray(\.|$)")
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's, which would wait for ever for an answer."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            answer_s = UPLOAD_TIMEOUT_S if method == "PUT" else ANSWER_TIMEOUT_S
            options.setdefault("timeout", (CONNECT_TIMEOUT_S, answer_s))
            return super()._do_request(method, endpoint, **options)

    with _address_of_its_own():
        return Client(address)


@contextlib.contextmanager
def _address_of_its_own() -> Iterator[None]:
    """The environment without what Ray heeds more than the address that it is given."""
    kept = {name: os.environ.pop(name) for name in _OVERRIDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _read(info: Any) -> Job:
    return Job(
        id=info.submission_id,
        status=str(getattr(info.status, "value", info.status)),  # pyright: ignore[reportArgumentType]
        entrypoint=info.entrypoint,
        message=info.message or "",
        driver_exit_code=info.driver_exit_code,
        started=info.start_time / 1000 if info.start_time else None,
        ended=info.end_time / 1000 if info.end_time else None,
        metadata=info.metadata or {},
    )


def _status_in(text: str) -> int | None:
    found = re.search(r"status code (\d{3})|^(\d{3}) (?:Client|Server) Error", text)
    return int(found[1] or found[2]) if found else None
