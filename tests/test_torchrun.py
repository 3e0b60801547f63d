"""Training under torchrun, as a user starts it: two ranks, no Ray."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.driver import make_plan, run_config
from pipeline.settings import Config
from pipeline.sources import list_inputs
from pipeline.train import train_in_process
from pipeline.workflow import read_manifest


def torchrun(config_path: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc-per-node 2 -m jobs train CONFIG` printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    given = [part for text in settings for part in ("--set", text)]
    process = subprocess.Popen(
        [*command, "-m", "jobs", "train", str(config_path), *given],
        cwd=config_path.parent,
        env=os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out)


@pytest.fixture
def config(tiny_config: Path) -> Config:
    """A config whose input shards are preprocessed, so that no step needs Ray."""
    config = load_config(tiny_config, [f"storage.root={tiny_config.parent / 'runs'}"])
    storage = make_plan(config).storage
    for shard in list_inputs(config.data, storage).shards:
        preprocess_shard(shard, config.data, storage)
    return config


def test_two_ranks_under_torchrun_learn_what_one_process_does(
    config: Config, tiny_config: Path
) -> None:
    settings = ["train.num_steps=30", "train.log_every=5"]
    done = torchrun(tiny_config, *settings)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("train      done in") == 1  # rank 0 speaks
    root = f"storage.root={tiny_config.parent / 'runs'}"
    planned = make_plan(load_config(tiny_config, [*settings, root]), ["train"])
    assert planned.is_cached
    train, data = ({p.step.name: p for p in planned.steps}[s] for s in ("train", "preprocess"))
    store = CheckpointStore(planned.storage, train.series_directory)
    ours = store.load(30)
    assert ours is not None
    assert [known["world_size"] for known in ours.environments] == [2]

    manifest = read_manifest(planned.storage, "preprocess", data.key)
    assert manifest is not None
    alone = load_config(tiny_config, [*settings, root])
    rows = train_in_process(alone, planned.storage, "alone", manifest)
    theirs = CheckpointStore(planned.storage, "alone").load(30)
    assert theirs is not None
    assert [r["loss"] for r in ours.history] == pytest.approx([r["loss"] for r in rows], rel=1e-5)
    for name, weight in theirs.ema.items():
        torch.testing.assert_close(ours.ema[name], weight, rtol=1e-4, atol=1e-5)


def test_the_documented_way_in_one_process_trains(
    config: Config, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "running.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tiny_config.parent)
    shorter = tiny_config.read_text().replace("num_steps = 300", "num_steps = 20")
    Path("my.toml").write_text(shorter)
    run_config(load_config("my.toml"), ("preprocess",), observer=lambda event: None)
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert [row["global_step"] for row in found["rows"]] == [20]


def test_more_ranks_than_can_share_a_batch_are_refused(config: Config, tiny_config: Path) -> None:
    done = torchrun(tiny_config, "train.global_batch_size=16", "train.num_workers=1")
    assert done.returncode != 0
    assert (
        "2 ranks cannot share train.global_batch_size = 16: each takes 16 or more. Start at most "
        "1, or raise it to 32." in done.stdout
    )
    assert "exitcode  : 2 " in done.stdout


@pytest.mark.parametrize("verb", ["run", "evaluate", "report"])
def test_what_is_not_for_all_ranks_is_refused_at_once(
    tiny_config: Path, run_cli: Callable[..., Any], verb: str
) -> None:
    world = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = run_cli(verb, str(tiny_config), cwd=tiny_config.parent, env=world)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Use torchrun for the verb train" in done.stdout + done.stderr
