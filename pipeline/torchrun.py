"""Training under `torchrun`, without Ray.

    torchrun --nproc-per-node 2 -m jobs train CONFIG

Every process runs the same command. Rank 0 follows the plan as ever and makes the step; the
others wait until it trains, run the loop with it, and leave. They meet at torchrun's own store.
Nothing here imports torch until it is used: every command asks whether torchrun started it.
"""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.errors import ClusterError

LONGEST_WAIT = timedelta(days=7)  # of the other ranks, for what comes before training
_KEY = "raydiffusion/settings"
_trains, _is_told = threading.Event(), threading.Event()  # what this process's SIGTERM does


@dataclass(frozen=True)
class World:
    """The processes that torchrun started, and which of them this is."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int  # ranks on this machine


def torchrun_world() -> World | None:
    """What torchrun says of this process; None where it did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, world_size, local_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    return World(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def sigterm_awaits_checkpoint() -> Iterator[None]:
    """Has SIGTERM, by which torchrun ends its ranks, wait for a checkpoint while the loop runs.

    For the main thread, around what may train, but not where it waits in torch for other ranks: no
    handler runs there. Before the first step SIGTERM ends the process as ever. Where a Ray was
    started in between, its handler takes this one's place.
    """

    def on_signal(number: int, frame: Any) -> None:
        if _trains.is_set():
            _is_told.set()
        else:
            signal.signal(number, before)
            signal.raise_signal(number)

    _trains.clear()
    _is_told.clear()
    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def training_is_told() -> Iterator[Callable[[], bool]]:
    """Yields what says whether there was a SIGTERM; once it is asked, none ends the process.

    That holds until the block is left well. With an error a process leaves of its own accord: it
    tells how it ended and gives up what it holds, while torchrun signals who is left.
    """

    def is_told() -> bool:
        _trains.set()
        return _is_told.is_set()

    yield is_told
    _trains.clear()


def check_gpus(world: World) -> None:
    """Whether each rank of this machine finds a GPU of its own, and NCCL.

    Raises:
        ClusterError: it does not, and torch would fail in its own words, on some of the ranks.
    """
    import torch
    import torch.distributed as dist

    found = torch.cuda.device_count()
    if found < world.local_size or not dist.is_nccl_available():
        has_nccl = "" if dist.is_nccl_available() else " and has no nccl"
        raise ClusterError(
            f"torch {torch.__version__} on {socket.gethostname()} finds {found} GPUs{has_nccl}, "
            f"and torchrun started {world.local_size} ranks there to train on one each. Install "
            "the CUDA build of torch (see the README), lower --nproc-per-node, or set "
            "train.use_gpu = false."
        )


def announce(settings: dict[str, Any]) -> None:
    """On rank 0: has the other ranks train with these settings."""
    open_store().set(_KEY, json.dumps(settings))


def dismiss() -> None:
    """On rank 0, at the end: has the other ranks leave, if they still wait.

    Without a store there is none who waits: torchrun was killed, and whoever waited has noticed.
    """
    try:
        socket.create_connection(_store_address(), timeout=10).close()
    except OSError:
        return  # at once; torch would try for minutes
    open_store().compare_set(_KEY, "", json.dumps(None))


def await_settings() -> dict[str, Any] | None:
    """On the other ranks: the settings to train with; None: there is nothing to do."""
    store = open_store()
    store.wait([_KEY], LONGEST_WAIT)
    return json.loads(store.get(_KEY))


def open_store(timeout: timedelta | None = None) -> Any:
    """That of torchrun, in which a restarted attempt has keys of its own.

    torch itself would find those of the attempt before, addresses of dead ranks among them, where
    torchrun keeps its store for all attempts: on one node, unless it is told otherwise.

    Args:
        timeout: for which ranks wait for one another's keys; none is torch's own, five minutes.
    """
    import torch.distributed as dist

    host, port = _store_address()
    how = {} if timeout is None else {"timeout": timeout}
    store = dist.TCPStore(host, port, None, False, **how)  # pyright: ignore
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(attempt, store)  # pyright: ignore[reportPrivateImportUsage]


def _store_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
