"""A user's extractor on a real Ray: tasks make features, and none that are there already."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
OWN = """
import torch
from torch import nn

def make():
    return nn.Sequential(Pixels(), nn.Linear(64, 3))

class Pixels(nn.Module):
    def forward(self, images):
        return images.flatten(1).float() / 255
"""
RUN = """
import json, sys
from pipeline.config import load_config
from pipeline.driver import run_config

events = []
config = load_config(sys.argv[1], sys.argv[2:])
outcome = run_config(config, ("reference",), observer=events.append)
progress = [dict(e.fields) for e in events if (e.kind, e.step) == ("progress", "reference")]
print(json.dumps({"metrics": outcome.manifests["reference"]["metrics"], "progress": progress}))
"""


@pytest.mark.slow
def test_the_features_of_a_new_shard_are_made_on_ray_and_no_others(
    tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "pixels_of_a_test.py").write_text(OWN)

    def measure(*names: str) -> dict[str, Any]:
        sources = json.dumps([str(DIGITS / name) for name in names])
        settings = [f"data.sources={sources}", "features.extractor=pixels_of_a_test:make"]
        settings += [f"storage.root={tmp_path / 'runs'}", "features.width=3", "cluster.num_cpus=2"]
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(tiny_config), *settings],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first = measure("digits-0000.tar", "digits-0001.tar")
    count = sum(first["metrics"]["counts"].values())
    assert first["metrics"]["forwarded"] == count
    assert first["progress"][0]["done"] == 0
    last = first["progress"][-1]
    assert (last["done"], last["total"], last["rate_unit"]) == (count, count, "images/s")
    second = measure("digits-0000.tar", "digits-0001.tar", "digits-0002.tar")
    new = sum(second["metrics"]["counts"].values()) - count
    assert second["metrics"]["forwarded"] == new > 0
    third = measure("digits-0001.tar", "digits-0002.tar")
    assert third["metrics"]["forwarded"] == 0
    assert third["progress"] == []
