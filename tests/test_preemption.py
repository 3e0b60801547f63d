"""Nodes that come and go: with notice, without, and for good measure back again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.two_nodes import two_nodes

from .conftest import cli_program

DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
client = GcsClient(address=sys.argv[1])
nodes = client.get_all_node_info()
(node,) = [id for id, info in nodes.items() if not info.is_head_node]
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
deadline_ms = int((time.time() + 600) * 1000)
accepted, message = client.drain_node(node.hex(), reason, "a test", deadline_ms)
assert accepted, message
"""


class Training(NamedTuple):
    """One that goes on until the test is over."""

    directory: Path  # of all trainings
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    address: str
    tell_nodes: Callable[[str], None]

    def wait_for(self, pattern: str, is_it: Callable[[Path], bool] = Path.is_file) -> Path:
        """The newest file of this pattern that is what is looked for, as soon as there is one."""
        deadline = time.monotonic() + 300
        while True:
            found = [path for path in sorted(self.directory.glob(pattern)) if is_it(path)]
            if found:
                return found[-1]
            assert self.process.poll() is None, "training ended"
            assert time.monotonic() < deadline, f"there is no such {pattern}"
            time.sleep(0.2)


@contextlib.contextmanager
def training_on_two_nodes(config_path: Path, **settings: Any) -> Iterator[Training]:
    """Trains on two nodes with room for a worker each."""
    cwd = config_path.parent
    environment = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(prefix="p-", dir="/tmp")}
    settings |= {"cpus_per_worker": 2, "num_steps": 200_000, "log_every": 20}
    options = [p for key, value in settings.items() for p in ("--set", f"train.{key}={value}")]
    with (
        (cwd / "ray.log").open("wb") as log,
        two_nodes(2, environment, log.fileno()) as (address, tell_nodes),
    ):
        process = subprocess.Popen(
            [cli_program(), "train", str(config_path), *options,
             "--set", f"cluster.address={address}"],
            cwd=cwd, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield Training(
                cwd / "runs" / "steps" / "train", process, environment, address, tell_nodes
            )
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


@pytest.mark.slow
def test_a_node_that_is_to_go_makes_a_checkpoint_between_others(tiny_config: Path) -> None:
    with training_on_two_nodes(tiny_config, num_workers=2, checkpoint_every=100_000) as training:
        training.wait_for("*/progress.json")
        subprocess.run(
            [sys.executable, "-c", DRAIN, training.address], check=True, env=training.environment
        )
        manifest = training.wait_for("*/checkpoints/*/manifest.json")
        assert 0 < json.loads(manifest.read_text())["global_step"] < 100_000


@pytest.mark.slow
def test_training_goes_on_with_one_node_and_takes_another_that_joins(tiny_config: Path) -> None:
    def is_of(*world_sizes: int) -> Callable[[Path], bool]:
        def look(manifest: Path) -> bool:
            try:
                document = json.loads(manifest.read_text())
            except FileNotFoundError:  # two newer ones have come
                return False
            return [e["world_size"] for e in document["environments"]] == list(world_sizes)

        return look

    with training_on_two_nodes(tiny_config, num_workers=[1, 2], checkpoint_every=50) as training:
        manifests = "*/checkpoints/*/manifest.json"
        training.wait_for(manifests, is_of(2))
        training.tell_nodes("remove")
        training.wait_for(manifests, is_of(2, 1))
        training.tell_nodes("add")
        training.wait_for(manifests, is_of(2, 1, 2))
