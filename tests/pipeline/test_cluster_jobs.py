"""Whether a cluster is on this machine, whatever its addresses look like."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster_jobs import JobServer

NODE, OTHER = "a1" * 28, "b2" * 28


@contextlib.contextmanager
def raylet(node_id: str, socket: Path) -> Iterator[None]:
    """A process with the options of Ray's own on a node, while the block runs."""
    options = [f"--raylet_socket_name={socket}", f"--node_id={node_id}"]
    process = subprocess.Popen([sys.executable, "-c", "input()", *options], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def is_here(monkeypatch: pytest.MonkeyPatch, *alive: str) -> bool:
    """What is said of a cluster of these nodes, all of which call themselves 127.0.0.1."""
    import ray.util.state

    nodes = [SimpleNamespace(node_id=each, node_ip="127.0.0.1", state="ALIVE") for each in alive]
    nodes.append(SimpleNamespace(node_id="c3" * 28, node_ip="10.0.0.1", state="DEAD"))
    monkeypatch.setattr(ray.util.state, "list_nodes", lambda address, timeout: nodes)
    server = object.__new__(JobServer)
    server.address = "http://127.0.0.1:8265"
    return server.is_here()


def test_a_cluster_is_here_if_each_living_node_is_a_process_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "raylet"
    socket.touch()
    with raylet(NODE, socket):
        assert is_here(monkeypatch, NODE)
        assert not is_here(monkeypatch, NODE, OTHER)
        assert not is_here(monkeypatch)
        with raylet(OTHER, socket):
            assert is_here(monkeypatch, NODE, OTHER)


def test_a_node_of_another_machine_behind_a_tunnel_is_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not is_here(monkeypatch, NODE)


def test_a_node_in_a_container_has_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raylet(NODE, tmp_path / "in the container"):
        assert not is_here(monkeypatch, NODE)
