"""A job on a head and two nodes of this machine, a pool for tasks and one with a GPU.

There is no GPU: Ray is told of one, and gives it to the workers of the training, which compute on
their CPU. All else is as on a cluster.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .clusters import DEADLINE_S, ray_head_in, ray_node_in, short_directory

# Stands in for `python` where the job is started: `-m jobs VERB ...`.
WITHOUT_CUDA = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import ray.train.torch
from pipeline import preflight, ray_train

def train(settings):
    import ray, torch, ray.train.torch
    from pipeline.ray_train import _train_worker
    assert ray.get_gpu_ids(), "the worker was given no GPU"
    ray.train.torch.get_device = lambda: torch.device("cpu")
    return _train_worker(settings)

def with_gloo(*, backend, make=ray.train.torch.TorchConfig, **options):
    assert backend == "nccl"
    return make(backend="gloo", **options)

preflight.check_gpus = preflight.check_collectives = lambda *_: "not looked at"
ray_train._train_worker, ray.train.torch.TorchConfig = train, with_gloo
sys.argv = sys.argv[2:]
runpy.run_module("jobs", run_name="__main__", alter_sys=True)
"""
# Prints the pools on whose nodes tasks and the workers of trainings ran, by name.
LOOK = """
import collections, json, sys
import ray
from ray.util.state import list_actors, list_tasks
from pipeline.cluster import POOL_LABEL

gcs, dashboard = sys.argv[1:]
ray.init(address=gcs, log_to_driver=False)
pools = {node["NodeID"]: node["Labels"].get(POOL_LABEL) for node in ray.nodes()}
ran = collections.defaultdict(set)
for task in list_tasks(dashboard, detail=True, limit=10_000):
    if task.node_id and task.type == "NORMAL_TASK":
        ran[task.name].add(pools[task.node_id])
for actor in list_actors(dashboard, detail=True, limit=1_000):
    if actor.node_id:
        ran[actor.class_name].add(pools[actor.node_id])
print(json.dumps({name: sorted(map(str, where)) for name, where in ran.items()}))
"""


@pytest.mark.slow
def test_a_job_prepares_on_the_cpu_pool_and_trains_on_the_gpu_pool(
    tiny_config: Path, run_cli: Callable[..., Any]
) -> None:
    path = tiny_config.parent
    shim, program = path / "without_cuda.py", path / "python"
    shim.write_text(WITHOUT_CUDA)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {shim} "$@"\n')
    program.chmod(0o755)
    settings = ["train.use_gpu=true", "train.num_workers=1", "train.num_steps=20"]
    options = [word for text in settings for word in ("--set", text)]
    with (
        short_directory() as one,
        short_directory() as two,
        short_directory() as three,
        ray_head_in(one, {}, num_cpus=0) as head,
        # Where Ray sees most room.
        ray_node_in(two, {}, head, 4, "--labels", "raydiffusion/pool=gpu", "--num-gpus", "1"),
        ray_node_in(three, {}, head, 1, "--labels", "raydiffusion/pool=cpu"),
    ):
        done = run_cli(
            "submit", "--address", head.address, "--python", str(program), "run", "tiny.toml",
            *options, cwd=path, timeout=2 * DEADLINE_S, env=head.environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        looked = subprocess.run(
            [sys.executable, "-c", LOOK, head.cluster, head.address],
            env={**os.environ, **head.environment}, capture_output=True, text=True,
            timeout=DEADLINE_S,
        )  # fmt: skip
    assert looked.returncode == 0, looked.stdout + looked.stderr
    ran = json.loads(looked.stdout.splitlines()[-1])
    tasks = {name: where for name, where in ran.items() if "FlatMap" in name}
    tasks |= {name: ran[name] for name in ("train_classifier", "_draw_chunks")}
    assert set(map(tuple, tasks.values())) == {("cpu",)}, ran
    assert len(tasks) >= 3, ran  # preprocessing is among them
    assert ran["RayTrainWorker"] == ["gpu"], ran
