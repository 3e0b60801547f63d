"""Training under torchrun, as a user starts it: two ranks, no Ray."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.driver import Plan, make_plan, run_config
from pipeline.loop import Hooks
from pipeline.runs import list_runs, read_run
from pipeline.settings import Config
from pipeline.sources import list_inputs
from pipeline.torchrun import dismiss
from pipeline.trace import TraceReader
from pipeline.train import train_in_process
from pipeline.workflow import PlannedStep, read_manifest

from .pipeline.test_loop import assert_same_to_the_bit


def torchrun(
    config_path: Path,
    *settings: str,
    restarts: int = 0,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc-per-node 2 -m jobs train CONFIG` printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts)]
    given = [part for text in settings for part in ("--set", text)]
    process = subprocess.Popen(
        [*command, "-m", "jobs", "train", str(config_path), *given],
        cwd=config_path.parent,
        env=os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"} | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        meanwhile(process)
        out, _ = process.communicate(timeout=300)  # for what takes half a minute
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks, which hold the pipe
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


def plan_of(config_path: Path, *settings: str, root: str = "runs") -> tuple[Plan, Config]:
    """The plan of a training below a root beside the config."""
    root = f"storage.root={config_path.parent / root}"
    config = load_config(config_path, [*settings, root])
    return make_plan(config, ["train"]), config


def step_of(planned: Plan, name: str) -> PlannedStep:
    return next(p for p in planned.steps if p.step.name == name)


def train_alone(planned: Plan, config: Config, directory: str, hooks: Hooks | None = None) -> Any:
    """The last checkpoint of a training in this process."""
    key = step_of(planned, "preprocess").key
    manifest = read_manifest(planned.storage, "preprocess", key)
    assert manifest is not None
    train_in_process(config, planned.storage, directory, manifest, hooks=hooks)
    return CheckpointStore(planned.storage, directory).load(config.train.num_steps)


def test_two_ranks_under_torchrun_learn_what_one_process_does(
    config: Config, tiny_config: Path
) -> None:
    """And either way goes on with what the other began."""
    log = "train.log_every=5"
    begun = "train.num_steps=5"
    run_config(plan_of(tiny_config)[1], ("preprocess",), observer=lambda event: None)
    planned, short = plan_of(tiny_config, begun, log)
    directory = step_of(planned, "train").series_directory
    train_alone(planned, short, directory)

    done = torchrun(tiny_config, "train.num_steps=30", log)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("train      done in") == 1  # rank 0 speaks
    assert "to do, on 2 ranks of torchrun," in done.stdout
    assert "continues from the checkpoint at step 5" in done.stdout
    planned, whole = plan_of(tiny_config, "train.num_steps=30", log)
    assert planned.is_cached
    assert step_of(planned, "train").series_directory == directory
    ours = CheckpointStore(planned.storage, directory).load(30)
    assert ours is not None
    worlds = [(known["since_step"], known["world_size"]) for known in ours.environments]
    assert worlds == [(0, 1), (5, 2)]

    theirs = train_alone(planned, whole, "alone")
    losses = [row["loss"] for row in theirs.history]
    assert [row["loss"] for row in ours.history] == pytest.approx(losses, rel=1e-5)
    for name, weight in theirs.ema.items():
        torch.testing.assert_close(ours.ema[name], weight, rtol=1e-4, atol=1e-5)

    longer, config = plan_of(tiny_config, "train.num_steps=40", log)
    first_steps: set[int] = set()
    hooks = Hooks(on_row=lambda row, first_step: first_steps.add(first_step))
    train_alone(longer, config, directory, hooks)
    assert first_steps == {30}


def await_step(reader: TraceReader, step: int) -> None:
    """Until training is there, or further."""
    deadline = time.monotonic() + 200
    while not any(row["global_step"] >= step for row in reader.rows):
        assert time.monotonic() < deadline
        reader.read()
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_that_torchrun_restarts_ends_as_one_that_was_not_killed(
    config: Config, tiny_config: Path
) -> None:
    settings = ["train.num_steps=200", "train.checkpoint_every=20", "train.log_every=2"]
    run_config(plan_of(tiny_config)[1], ("preprocess",), observer=lambda event: None)
    shutil.copytree(tiny_config.parent / "runs", tiny_config.parent / "killed")
    reader = TraceReader(tiny_config.parent / "trace")

    def kill(process: subprocess.Popen[str]) -> None:
        await_step(reader, 50)
        os.kill(next(row["pid"] for row in reader.began if row["rank"] == 1), signal.SIGKILL)

    killed = torchrun(
        tiny_config,
        *settings,
        f"storage.root={tiny_config.parent / 'killed'}",
        restarts=1,
        env={"RAYDIFFUSION_TRACE": str(tiny_config.parent / "trace")},
        meanwhile=kill,
    )
    assert killed.returncode == 0, killed.stdout
    reader.read()
    assert [row["rank"] for row in reader.began].count(1) == 2
    assert {row["first_step"] for row in reader.rows} > {0}  # and not from the beginning again
    whole = torchrun(tiny_config, *settings)
    assert whole.returncode == 0, whole.stdout
    ends = []
    for root in ("runs", "killed"):
        planned, _ = plan_of(tiny_config, *settings, root=root)
        assert planned.is_cached
        directory = step_of(planned, "train").series_directory
        ends.append(CheckpointStore(planned.storage, directory).load(200))
    assert_same_to_the_bit(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["torchrun", "rank 1"])
def test_a_signal_costs_no_step(config: Config, tiny_config: Path, told: str) -> None:
    """SIGTERM, as of a machine that is about to be taken away."""
    settings = ["train.num_steps=1000000", "train.checkpoint_every=1000000", "train.log_every=2"]
    run_config(plan_of(tiny_config)[1], ("preprocess",), observer=lambda event: None)
    reader = TraceReader(tiny_config.parent / "trace")

    def tell(process: subprocess.Popen[str]) -> None:
        await_step(reader, 50)
        ranks = {f"rank {row['rank']}": row["pid"] for row in reader.began}
        os.kill(ranks.get(told, process.pid), signal.SIGTERM)

    trace = {"RAYDIFFUSION_TRACE": str(tiny_config.parent / "trace")}
    done = torchrun(tiny_config, *settings, env=trace, meanwhile=tell)
    assert done.returncode != 0
    assert done.stdout.count("Interrupted. Finished steps and checkpoints are kept") == 1
    assert "failed:" not in done.stdout
    planned, _ = plan_of(tiny_config, *settings)
    record = read_run(planned.storage, list_runs(planned.storage)[-1])
    assert record["executions"][-1]["outcome"] == "interrupted"
    directory = step_of(planned, "train").series_directory
    (step,) = CheckpointStore(planned.storage, directory).steps()
    reader.read()
    assert step == max(row["global_step"] for row in reader.rows) >= 50


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


def test_a_rank_that_waits_for_rank_0_ends_at_once(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore
    script = (
        "from pipeline import torchrun, train\n"
        "wait = torchrun.await_settings\n"
        "train.await_settings = lambda: print('waits', flush=True) or wait()\n"
        "from jobs.cli import app\n"
        "app(['train', 'any.toml'])\n"
    )
    world = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | world | {"TORCHELASTIC_RESTART_COUNT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        time.sleep(1)  # it does so in a moment
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("verb", ["run", "evaluate", "report"])
def test_what_is_not_for_all_ranks_is_refused_at_once(
    tiny_config: Path, run_cli: Callable[..., Any], verb: str
) -> None:
    world = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = run_cli(verb, str(tiny_config), cwd=tiny_config.parent, env=world)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Use torchrun for the verbs train and preprocess" in done.stdout + done.stderr


@pytest.mark.parametrize("is_there", [True, False])
def test_rank_0_does_not_wait_for_a_torchrun_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    class Store:
        compare_set = Mock()

    monkeypatch.setattr("pipeline.torchrun.open_store", Store)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # where nothing listens yet
        if is_there:
            server.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        dismiss()
    assert Store.compare_set.call_count == is_there
