"""What a node says of itself: one short task on each, pinned there, with a time-out.

Here are the questions and how they are sent; what the answers mean is for `node_checks.py`. The
tasks ask for no CPU, so that they run on busy nodes too.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.cluster import PACKAGES, Node
from pipeline.errors import RaydiffusionError
from pipeline.identities import InputFile, check_readable
from pipeline.processes import boot_id
from pipeline.storage import open_storage

TIMEOUT_S = 60.0  # a first task takes two seconds, and more where packages lie on a network
LIBRARIES = ("ray", "torch", "pyarrow", "numpy", "pillow", "safetensors", "torchmetrics")
SHM = Path("/dev/shm")
UNSHARED, BUSY = "unshared", "busy"


@dataclass(frozen=True)
class Question:
    """What a node is asked.

    Args:
        node: its id; the name of the file that it writes.
        storage: URI of the storage root; none: it is not tried.
        probe: the directory below the root where this process wrote `driver`.
        temp: the directory of Ray's session on the node.
        files: of the input, to be opened.
        imports_torch: whether to ask torch which backends it has.
    """

    node: str = ""
    storage: str | None = None
    probe: str = ""
    temp: str = ""
    files: tuple[InputFile, ...] = ()
    imports_torch: bool = False


@dataclass(frozen=True)
class Facts:
    """What a node answers.

    Args:
        host: tells machines apart, for several nodes may be one machine.
        host_address: what the host's name resolves to there; none: to nothing.
        interface: the network interface that gloo was told to use.
        versions: of Python and the libraries that are installed.
        code: a hash of this project's modules as imported there.
        shm_bytes: size of /dev/shm; none: there is none.
        temp_free_bytes: where Ray's session is.
        temp_total_bytes: likewise.
        backends: of torch.distributed.
        storage_fault: a sentence, or UNSHARED when the driver's file is not there.
        input_fault: the sentence for a file that cannot be read.
    """

    host: str
    host_address: str | None
    interface: str | None
    versions: dict[str, str]
    code: str
    shm_bytes: int | None
    temp_free_bytes: int
    temp_total_bytes: int
    backends: tuple[str, ...] = ()
    storage_fault: str | None = None
    input_fault: str | None = None


def look(question: Question) -> Facts:
    """Answers a question about the machine that this runs on."""
    temp = shutil.disk_usage(question.temp or tempfile.gettempdir())
    return Facts(
        host=f"{socket.gethostname()} {boot_id()}",
        host_address=_host_address(),
        interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        versions=_versions(),
        code=hash_code(),
        shm_bytes=shutil.disk_usage(SHM).total if SHM.is_dir() else None,
        temp_free_bytes=temp.free,
        temp_total_bytes=temp.total,
        backends=_backends() if question.imports_torch else (),
        storage_fault=_try_storage(question),
        input_fault=_try_input(question.files),
    )


def look_at_gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of each GPU that torch sees in this process; opens them."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return [(device.name, device.total_memory) for device in found]


def ask(
    nodes: Sequence[Node],
    function: Callable[..., Any],
    arguments: Callable[[Node], tuple[Any, ...]],
    *,
    num_gpus: int = 0,
) -> dict[Node, Any]:
    """Runs a function as one task on each of the nodes, for at most `TIMEOUT_S`.

    The answer is the result or the exception: a TimeoutError where there was none by then; BUSY
    where the GPUs asked for are in use.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function)
    sent: dict[Any, Node] = {}
    for node in nodes:
        # A task for a busy GPU would wait until it is free, which may be for days.
        pinned = NodeAffinitySchedulingStrategy(
            node.id, soft=False, _fail_on_unavailable=num_gpus > 0
        )
        sent[task.options(scheduling_strategy=pinned).remote(*arguments(node))] = node
    if not sent:
        return {}
    _, late = ray.wait(list(sent), num_returns=len(sent), timeout=TIMEOUT_S)
    answers: dict[Node, Any] = {}
    for reference, node in sent.items():
        if reference in late:
            ray.cancel(reference, force=True)
            answers[node] = TimeoutError(f"no answer within {TIMEOUT_S:.0f} s")
            continue
        try:
            answers[node] = ray.get(reference)
        except TaskUnschedulableError as error:
            answers[node] = BUSY if num_gpus else error
        except RayTaskError as error:
            answers[node] = error.cause or error
        except RayError as error:
            answers[node] = error
    return answers


def hash_code() -> str:
    """A hash of this project's modules as this process would import them."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        home = Path(spec.origin).parent
        for path in sorted(home.rglob("*.py")):
            digest.update(f"{package} {path.relative_to(home)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _backends() -> tuple[str, ...]:
    import torch.distributed as dist

    if not dist.is_available():
        return ()
    has = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return tuple(name for name, is_there in has.items() if is_there)


def _host_address() -> str | None:
    """What gloo binds to, unless told an interface: the address of the host's own name."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _try_storage(question: Question) -> str | None:
    """Reads what the driver wrote, then writes; nothing where the driver's file is not there."""
    if question.storage is None:
        return None
    storage = open_storage(question.storage)
    try:
        if storage.read(f"{question.probe}/driver") != question.probe.encode():
            return UNSHARED
        storage.create(f"{question.probe}/{question.node}", question.node.encode())
    except FileNotFoundError:
        return UNSHARED
    except RaydiffusionError as error:
        return str(error)
    return None


def _try_input(files: Sequence[InputFile]) -> str | None:
    for file in files:
        try:
            check_readable(file)
        except RaydiffusionError as error:
            return str(error)
    return None
