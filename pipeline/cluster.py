"""Ray: starting or joining a cluster, and leaving it. Whether work fits it: `preflight.py`.

Ray is imported only here, in `preprocess`, `train` and where tasks are sent, and only once
something has to run.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ClusterError
from pipeline.processes import is_process_alive
from pipeline.settings import CLIENT, Config
from pipeline.workflow import Resources

PACKAGES = ("diffusion_core", "pipeline", "jobs")
POOL_LABEL = "raydiffusion/pool"  # of a node, given when Ray is started there
CPU_POOL = "cpu"  # where tasks run that ask for no GPU
CONNECT_TIMEOUT_S = 10
_own_directories: list[str] = []  # of the Ray that this process has started, if it has
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes

# Read by Ray where they must be set before it starts. Reports and polls twice a second instead
# of every two; no metrics exporter, no preemption poller; starvation and a placement group that
# never comes become errors in minutes, not half hours. See docs/decisions/0002-ray-train.md.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "300",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a step that is interrupted must not start another Ray
}


# After the loss of a node Ray first asks for as many workers as before and gives up after this:
# three quarters of the outage were this wait of 60 s.
ELASTIC_START_TIMEOUT_S = "15"


def ray_environment(config: Config) -> dict[str, str]:
    """What Ray reads from the environment, where the user has set nothing else."""
    environment = dict(RAY_ENVIRONMENT)
    if config.train.min_workers < config.train.max_workers:
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = ELASTIC_START_TIMEOUT_S
    if config.cluster.address is not None:  # whose nodes may be taken away with a notice
        del environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
    return environment


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers; before Ray runs, its CPUs and GPUs alone."""

    cpus: int
    gpus: int
    id: str = ""
    address: str = "this machine"
    object_store_bytes: int = 0
    temp: str = ""  # where Ray's session is
    pool: str = ""  # its label


def local_nodes(config: Config) -> list[Node] | None:
    """The nodes of the Ray that would be started here; None when a cluster is to be joined."""
    if config.cluster.address is not None:
        return None
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    cpus = config.cluster.num_cpus or available or os.cpu_count() or 1
    return [Node(cpus=cpus, gpus=_local_gpus())]


@contextlib.contextmanager
def connect(config: Config) -> Iterator[list[Node]]:
    """Joins the configured cluster, or starts Ray on this machine for the time of the block.

    A Ray that this process already uses is used and left as it is. One started here lives no
    longer than this process, however that ends.

    Yields:
        The nodes that are alive.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    for name, value in ray_environment(config).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray(\.|$)")
    import ray

    if ray.is_initialized():
        yield alive_nodes()
        return
    remove_stale_directories()
    temp = tempfile.mkdtemp(prefix=_temp_prefix(os.getpid()))
    try:
        # Ray puts the driver's directory before everything else on its workers' path: from an
        # empty one, no `pipeline/` that a user happens to stand in can take our place.
        with contextlib.chdir(temp):
            _start_or_join(ray, config, temp)
    except Exception as error:  # Ray raises also its own, and bare ones
        shutil.rmtree(temp, ignore_errors=True)
        _own_directories.clear()
        first = str(error).strip().split("\n")[0]
        remedy = (
            "Check cluster.address, that the cluster is up, and that RAY_AUTH_MODE and the token "
            "are its own, or leave the address out to start Ray here."
            if config.cluster.address
            else f"See that {tempfile.gettempdir()} has room, or set TMPDIR; `raydiffusion doctor "
            "CONFIG` looks at more."
        )
        raise ClusterError(
            f"Ray at {config.cluster.address or 'this machine'} cannot be used: {first}. {remedy}"
        ) from error
    try:
        yield alive_nodes()
    except (KeyboardInterrupt, SystemExit):
        raise  # threads of running steps still use Ray, which ends with this process
    except BaseException:
        _leave(ray, temp)
        raise
    else:
        _leave(ray, temp)


def _leave(ray: Any, temp: str) -> None:
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
    _own_directories.clear()


def end_own_ray() -> None:
    """Kills the processes of a Ray that this one started, and removes what they wrote.

    For an exit that cannot wait for threads which use Ray, just before it. Left to themselves its
    agents look for it for a minute and more. Ray's own thread in this process ends it with code 1
    when it sees one of them gone: they are stopped, so that none writes, and killed at the last.
    """
    if not _own_directories:
        return
    import psutil  # Ray brings it  # pyright: ignore[reportMissingModuleSource]

    stopped: set[psutil.Process] = set()
    while new := set(psutil.Process().children(recursive=True)) - stopped:
        for child in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()
        stopped |= new
    for directory in _own_directories:
        shutil.rmtree(directory, ignore_errors=True)
    for child in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _temp_prefix(pid: int | str) -> str:
    """Of Ray's directory: short, for sockets lie below it, and telling whose it is."""
    host = f"{socket.gethostname()}{uuid.getnode()}"
    return f"rd-{hashlib.sha256(host.encode()).hexdigest()[:6]}-{pid}-"


def max_temp_length() -> int:
    """Characters that the path for temporary files may have where Ray is started here.

    Below it comes `<ours>/session_<time>_<pid>/sockets/plasma_store`.
    """
    pid = os.getpid()
    ours = f"/{_temp_prefix(pid)}12345678/session_2026-01-01_00-00-00_000000_{pid}"
    return MAX_SOCKET_PATH - len(f"{ours}/sockets/plasma_store")


def remove_stale_directories() -> None:
    """Clears up after processes of this host that were killed."""
    for path in Path(tempfile.gettempdir()).glob(_temp_prefix("*") + "*"):
        pid = path.name.split("-")[2]
        if not is_process_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _start_or_join(ray: Any, config: Config, temp: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    nodes = local_nodes(config)
    if nodes is not None:
        # "local" also where RAY_ADDRESS is set: the config says where the work runs.
        _own_directories.append(temp)
        ray.init("local", num_cpus=nodes[0].cpus, include_dashboard=False, _temp_dir=temp, **quiet)
    else:
        address = config.cluster.address
        assert address is not None  # then there would be local nodes
        if address == "auto" and os.environ.get("RAY_ADDRESS", "").startswith(CLIENT):
            raise ConnectionError("RAY_ADDRESS is of Ray's client, and Ray Data needs more")
        _check_reachable(address)
        ray.init(address, runtime_env=_code(), **quiet)


def _check_reachable(address: str) -> None:
    """Fails within seconds where Ray's own client would retry for a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like: Ray knows
    with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
        pass


def _code() -> dict[str, Any]:
    """This project's packages for the workers of a cluster that may not have them."""
    root = Path(__file__).resolve().parent.parent
    packages = [str(root / name) for name in PACKAGES]
    # What Python compiled is no part of what is sent: it would be sent again whenever it changes.
    return {"py_modules": packages, "excludes": ["__pycache__"]}


def alive_nodes() -> list[Node]:
    """Those of the cluster that this process is connected to."""
    import ray

    return [_read_node(node) for node in ray.nodes() if node["Alive"]]


def _read_node(node: dict[str, Any]) -> Node:
    resources = node["Resources"]
    return Node(
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        id=node["NodeID"],
        address=node["NodeManagerAddress"],
        object_store_bytes=int(resources.get("object_store_memory", 0)),
        temp=str(Path(node["RayletSocketName"]).parents[2]),  # <temp>/session_*/sockets/raylet
        pool=node.get("Labels", {}).get(POOL_LABEL, ""),
    )


def free_now() -> Resources:
    """What no one holds at this moment, on the whole cluster."""
    import ray

    free = ray.available_resources()
    return Resources(cpus=int(free.get("CPU", 0)), gpus=int(free.get("GPU", 0)))


def total(nodes: Sequence[Node]) -> Resources:
    """The whole cluster's resources."""
    return Resources(cpus=sum(n.cpus for n in nodes), gpus=sum(n.gpus for n in nodes))


def nodes_for_tasks(nodes: Sequence[Node]) -> list[Node]:
    """Where tasks run that ask for no GPU: on the pool for them, if there is one, else anywhere."""
    return [node for node in nodes if node.pool == CPU_POOL] or list(nodes)


def gpu_places(nodes: Sequence[Node]) -> int:
    """How many tasks of 1 CPU and 1 GPU each they hold at a time; a task needs both on one node."""
    return sum(min(node.cpus, node.gpus) for node in nodes)


def place_tasks() -> tuple[dict[str, Any], list[int]]:
    """Ray's options for tasks that ask for no GPU, and the CPUs of each node they may run on.

    Training needs no such option: its GPUs are where they are.
    """
    nodes = nodes_for_tasks(alive_nodes())
    has_pool = bool(nodes) and nodes[0].pool == CPU_POOL
    options = {"label_selector": {POOL_LABEL: CPU_POOL}} if has_pool else {}
    return options, [node.cpus for node in nodes]


def _local_gpus() -> int:
    """GPUs that Ray will find on this machine, without importing it or torch."""
    count = _count_driver_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    # Of parts of one GPU, each with a name of its own there, Ray takes as many as there are GPUs.
    return min(count, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))


def _count_driver_gpus() -> int:
    """What NVIDIA's driver tells, as Ray asks it; a WSL has no device files."""
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    number = ctypes.c_uint(0)
    if driver.nvmlInit_v2() != 0:
        return 0
    driver.nvmlDeviceGetCount_v2(ctypes.byref(number))
    driver.nvmlShutdown()
    return number.value
