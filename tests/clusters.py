"""Ray nodes of a test's own: processes with a directory, an environment and ports of their own."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 240
HOST = "127.0.0.1"
PROGRAMS = Path(sys.executable).parent


@dataclass
class Head:
    """A Ray head in a process of its own."""

    process: subprocess.Popen[str]
    cluster: str  # the address to join
    port: int  # of the dashboard
    temp: Path
    environment: dict[str, str] = field(repr=False)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def find_driver(self) -> int:
        """The process id of the one job that runs."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                is_below = (path / "cwd").readlink().is_relative_to(self.temp)
                if is_below and words[1:3] == [b"-m", b"jobs"]:
                    return int(path.name)
        raise AssertionError("no job runs")

    def kill(self) -> None:
        """SIGKILL for all its processes at once, as when the machine loses its power."""
        kill_node(self.process)


@contextlib.contextmanager
def ray_head_in(directory: Path, environment: Mapping[str, str], num_cpus: int) -> Iterator[Head]:
    """A head with its dashboard and a token of its own, while the block runs.

    Args:
        directory: where it is started and where Ray's session is.
        environment: of its processes, beside that of the tests.
        num_cpus: that it offers.
    """
    gcs, dashboard, client = free_ports(3)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    options = [
        "--head", "--num-cpus", str(num_cpus), "--port", str(gcs),
        "--dashboard-host", HOST, "--dashboard-port", str(dashboard),
        "--ray-client-server-port", str(client),
    ]  # fmt: skip
    with _ray_start(directory, environment, options) as process:
        yield Head(process, f"{HOST}:{gcs}", dashboard, directory, environment)


@contextlib.contextmanager
def ray_node_in(
    directory: Path, environment: Mapping[str, str], head: Head, num_cpus: int, *options: str
) -> Iterator[None]:
    """Another node of a head's cluster, while the block runs; see `ray_head_in`."""
    given = ["--address", head.cluster, "--num-cpus", str(num_cpus), *options]
    with _ray_start(directory, {**head.environment, **environment}, given):
        yield


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory for Ray: pytest's own are too long for the sockets below them."""
    path = Path(tempfile.mkdtemp(prefix="raydiffusion-")).resolve()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _ray_start(
    directory: Path, environment: Mapping[str, str], options: list[str]
) -> Iterator[subprocess.Popen[str]]:
    log = directory / "ray_start.log"
    (agent,) = free_ports(1)
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(PROGRAMS / "ray"), "start", "--block", *options, "--node-ip-address", HOST,
             "--dashboard-agent-listen-port", str(agent),
             "--min-worker-port", "0", "--max-worker-port", "0",  # any: nodes share this machine
             "--object-store-memory", str(100 << 20),
             "--temp-dir", str(directory), "--disable-usage-stats"],
            cwd=directory, env={**os.environ, **environment}, stdout=file, stderr=file, text=True,
        )  # fmt: skip
    try:
        wait_for(lambda: "block forever" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        kill_node(process)  # in order, Ray takes half a minute
        process.wait(timeout=DEADLINE_S)


def kill_node(process: subprocess.Popen[str]) -> None:
    """SIGKILL for `ray start` and all that it started."""
    import ray  # noqa: F401  # it brings psutil

    import psutil  # isort: skip  # pyright: ignore[reportMissingModuleSource]

    if process.poll() is not None:
        return
    processes = [psutil.Process(process.pid)]
    processes += processes[0].children(recursive=True)
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def wait_for(is_there: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := is_there()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found
