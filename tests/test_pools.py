"""Two nodes on this machine, one of them the pool for tasks: what runs where."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Prints the nodes by label, and on which of them the tasks of preprocessing and a task of
# `send_task` ran. The other node has more CPUs, so that Ray would prefer it.
RUN = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks
from pipeline.cluster import POOL_LABEL
from pipeline.config import load_config
from pipeline.driver import run_config
from pipeline.tasks import send_task
from pipeline.workflow import Resources

settings = sys.argv[1:]
store = {"object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, **store})
cluster.add_node(num_cpus=4, labels={POOL_LABEL: "gpu"}, **store)
cluster.add_node(num_cpus=1, labels={POOL_LABEL: "cpu"}, **store)
ray.init(address=cluster.address, log_to_driver=False)
config = load_config(settings[0], [*settings[1:], f"cluster.address={cluster.address}"])
run_config(config, ("preprocess",), observer=lambda event: None)
node = send_task(lambda: ray.get_runtime_context().get_node_id(), Resources(cpus=1))
pools = {n["NodeID"]: n["Labels"].get(POOL_LABEL) for n in ray.nodes()}
ran = [
    (task.name, pools[task.node_id]) for task in list_tasks(detail=True, limit=1000)
    if task.node_id and "FlatMap" in task.name
]
print(json.dumps({"sent": pools[node], "ran": ran}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_tasks_that_ask_for_no_gpu_run_on_the_pool_for_them(tiny_config: Path) -> None:
    root = f"storage.root={tiny_config.parent / 'runs'}"
    with tempfile.TemporaryDirectory(prefix="raydiffusion-") as temp:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(tiny_config), root],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": temp},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {pool for _, pool in found["ran"]} == {"cpu"}
    assert found["sent"] == "cpu"
