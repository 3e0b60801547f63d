"""Two Ray nodes on this machine, in a process of their own, one of which comes and goes.

    python -m pipeline.two_nodes CPUS

prints the cluster's address once both nodes are there. The line `remove` on its standard input
takes the second node away, with all its processes at once as when a machine loses its power; `add`
brings another; the end of the input ends the cluster. Ray's directory is below `RAY_TMPDIR`. Nodes
of one machine share its address, memory and disk: what is rehearsed is the loss of processes, not
of a network.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.errors import ClusterError

OBJECT_STORE_BYTES = 100 << 20  # of each node; training keeps nothing there


@contextlib.contextmanager
def two_nodes(
    cpus: int, environment: Mapping[str, str], log: int
) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Runs the cluster while the block runs.

    Args:
        cpus: of each node.
        environment: of its processes; `RAY_TMPDIR` must be in it.
        log: a file descriptor for what it prints otherwise.

    Yields:
        Its address, and a function that is told to `remove` the second node, or to `add` one.

    Raises:
        ClusterError: it did not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.two_nodes", str(cpus)],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C is for the one who started us, who ends it in order
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def tell(command: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{command}\n")
        process.stdin.flush()

    try:
        address = process.stdout.readline().strip()
        if not address:
            raise ClusterError(
                "Two Ray nodes could not be started on this machine. `raydiffusion doctor CONFIG` "
                "says what Ray misses here."
            )
        yield address, tell
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.stdout.close()


def main() -> None:
    """Runs the two nodes until the standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, and the address must stand alone
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {
        "num_cpus": int(sys.argv[1]),
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        print(cluster.address, file=out, flush=True)
        for command in sys.stdin:
            if command == "add\n":
                second = cluster.add_node(**node)
                continue
            (raylet,) = second.all_processes["raylet"]
            workers = _descendants(raylet.process.pid)
            cluster.remove_node(second, allow_graceful=False)
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
    finally:
        cluster.shutdown()


def _descendants(pid: int) -> list[int]:
    import psutil  # Ray brings it  # pyright: ignore[reportMissingModuleSource]

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


if __name__ == "__main__":
    main()
