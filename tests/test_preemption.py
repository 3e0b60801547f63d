"""A node that is to be taken away, with notice: a checkpoint is made at once."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


@pytest.mark.slow
def test_a_node_that_is_to_go_makes_a_checkpoint_between_others(tiny_config: Path) -> None:
    cwd = tiny_config.parent
    environment = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(prefix="p-", dir="/tmp")}
    settings = {
        "train.num_workers": 2,
        "train.cpus_per_worker": 2,  # one worker to a node
        "train.num_steps": 200_000,
        "train.checkpoint_every": 100_000,
        "train.log_every": 20,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with (
        (cwd / "ray.log").open("wb") as log,
        two_nodes(2, environment, log.fileno()) as (address, _),
    ):
        process = subprocess.Popen(
            [cli_program(), "train", str(tiny_config), *options,
             "--set", f"cluster.address={address}"],
            cwd=cwd, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            training = cwd / "runs" / "steps" / "train"
            wait_for(training, "*/progress.json", process)
            subprocess.run([sys.executable, "-c", DRAIN, address], check=True, env=environment)
            (manifest,) = wait_for(training, "*/checkpoints/*/manifest.json", process)
            assert 0 < json.loads(manifest.read_text())["global_step"] < 100_000
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def wait_for(directory: Path, pattern: str, process: subprocess.Popen[bytes]) -> list[Path]:
    """The files of this pattern, as soon as there are any."""
    deadline = time.monotonic() + 300
    while not (found := list(directory.glob(pattern))):
        assert process.poll() is None, "training ended"
        assert time.monotonic() < deadline, f"there is no {pattern}"
        time.sleep(0.2)
    return found
