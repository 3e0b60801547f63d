"""Bad input: one sentence with the remedy, the exit code of the design, nothing half-written."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.leases import hold_lease
from pipeline.storage import open_storage

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr


def test_a_missing_config(tmp_path: Path, run_cli: RunCli) -> None:
    done = run_cli("run", "none.toml", cwd=tmp_path)
    assert_refused(done, 2, "There is no config file at none.toml", "Give the path")
    assert list(tmp_path.iterdir()) == []


def test_faults_of_a_config_all_at_once(tiny_config: Path, call_cli: RunCli) -> None:
    options = ("--set", "train.lr=1", "--set", "data.resolution=9")
    done = call_cli("run", str(tiny_config), *options, cwd=tiny_config.parent)
    assert_refused(
        done, 2, "train.lr is not a known key. Did you mean 'learning_rate'?",
        "data.resolution must be divisible by 2 for the 2 levels", "has 2 faults",
    )  # fmt: skip
    assert not (tiny_config.parent / "runs").exists()


def test_a_schedule_that_is_none(tiny_config: Path, call_cli: RunCli) -> None:
    options = ("--set", "diffusion.schedule=linear", "--set", "diffusion.num_train_timesteps=10")
    done = call_cli("run", str(tiny_config), *options, cwd=tiny_config.parent)
    assert_refused(done, 2, "every beta must lie between 0 and 1", "Raise num_train_timesteps")


def test_no_shards_at_the_path(tiny_config: Path, call_cli: RunCli) -> None:
    done = call_cli(
        "run", str(tiny_config), "--set", 'data.sources=["no/*.tar"]', cwd=tiny_config.parent
    )
    assert_refused(done, 3, "There are no images at", "no/*.tar", "Check data.sources")
    assert not (tiny_config.parent / "runs").exists()


def test_an_empty_shard(tiny_config: Path, call_cli: RunCli) -> None:
    (tiny_config.parent / "empty.tar").write_bytes(b"")
    done = call_cli(
        "run", str(tiny_config), "--set", 'data.sources=["empty.tar"]', cwd=tiny_config.parent
    )
    assert_refused(done, 3, "empty.tar is empty (0 bytes)", "leave it out")
    assert not (tiny_config.parent / "runs").exists()


def test_more_workers_than_the_machine_holds(tiny_config: Path, call_cli: RunCli) -> None:
    options = ("--set", "train.num_workers=64", "--set", "train.global_batch_size=1024")
    done = call_cli(
        "run", str(tiny_config), *options, "--set", "cluster.num_cpus=2", cwd=tiny_config.parent
    )
    assert_refused(
        done, 7, "train.num_workers = 64 workers of 1 CPU each", "2 CPUs) holds 2",
        "Set train.num_workers = 2",
    )  # fmt: skip
    assert not (tiny_config.parent / "runs" / "steps").exists()


def test_a_cluster_that_is_not_there(tiny_config: Path, run_cli: RunCli) -> None:
    done = run_cli(
        "run", str(tiny_config), "--set", "cluster.address=127.0.0.1:1", cwd=tiny_config.parent
    )
    assert_refused(done, 7, "Ray at 127.0.0.1:1 cannot be used", "Check cluster.address")


@pytest.mark.parametrize("root", ["occupied", "/proc/runs"])
def test_an_unwritable_storage_root(tiny_config: Path, call_cli: RunCli, root: str) -> None:
    (tiny_config.parent / "occupied").write_text("a file")
    done = call_cli(
        "run", str(tiny_config), "--set", f"storage.root={root}", cwd=tiny_config.parent
    )
    assert_refused(done, 4, "Cannot ", root, "set storage.root to another place")


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("storage.root=foo://x", 4, "Protocol not known: foo"),
        ('data.sources=["foo://x/*.tar"]', 3, "Protocol not known: foo"),
        ("diffusion.schedule_options={tau=0.0}", 2, "does not take these options"),
    ],
)
def test_addresses_and_options_that_mean_nothing(
    tiny_config: Path, call_cli: RunCli, override: str, code: int, message: str
) -> None:
    done = call_cli("run", str(tiny_config), "--set", override, cwd=tiny_config.parent)
    assert_refused(done, code, message)


def test_an_unknown_run(tmp_path: Path, call_cli: RunCli) -> None:
    assert_refused(call_cli("status", "digits-0", cwd=tmp_path), 2, "There is no run 'digits-0'")


def test_a_directory_that_looks_like_markup_is_printed_as_it_is(
    tmp_path: Path, call_cli: RunCli
) -> None:
    root = tmp_path / "exp [draft] :smile: [" / "runs"
    root.mkdir(parents=True)
    said = call_cli("status", str(root), cwd=tmp_path).stdout
    assert said == f"There are no runs below {root}.\n"
    step = {"state": "planned", "reason": "data.sources was d[/**/*.tar :smile:"}
    execution = {"started": 1.0, "ended": 2.0, "outcome": "done", "steps": {"train": step}}
    document = {
        "run": "m-1", "name": "m", "identities": {}, "directories": {}, "executions": [execution]
    }  # fmt: skip
    open_storage(str(root)).create("runs/m-1/run.json", json.dumps(document).encode())
    said = call_cli("status", "m-1", "--root", str(root), cwd=tmp_path).stdout
    assert "data.sources was d[/**/*.tar :smile:" in said
    said = call_cli("report", str(root), cwd=tmp_path).stdout
    assert said == f"home: {root}/index.html\n"


@pytest.mark.parametrize("option", ["--root", "--json"])
def test_a_reader_that_goes_is_no_interruption(option: str, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    arguments = ["models", *(("--root", "runs") if option == "--root" else (option,))]
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=tmp_path, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    os.close(writes)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")


def test_errors_are_json_when_asked(tmp_path: Path, call_cli: RunCli) -> None:
    done = call_cli("plan", "none.toml", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2


def test_plan_starts_nothing(tiny_config: Path, call_cli: RunCli) -> None:
    done = call_cli("plan", str(tiny_config), "--json", cwd=tiny_config.parent)
    steps = json.loads(done.stdout)["steps"]
    assert [s["action"] for s in steps] == ["run"] * 7
    assert not (tiny_config.parent / "runs" / "steps").exists()
    assert not (tiny_config.parent / "runs" / "runs").exists()


@pytest.mark.parametrize("waits", [True, False])
def test_a_second_run_waits_or_leaves(tiny_config: Path, run_cli: RunCli, waits: bool) -> None:
    cwd = tiny_config.parent
    planned = json.loads(run_cli("plan", str(tiny_config), "--json", cwd=cwd).stdout)
    storage = open_storage(str(cwd / "runs"))
    directory = f"runs/{planned['run']}"
    if not waits:
        with hold_lease(storage, directory):
            done = run_cli("run", str(tiny_config), "--no-wait", cwd=cwd)
        assert_refused(done, 8, f"is working on {directory}", "leave out --no-wait")
        return
    release = threading.Event()

    def hold() -> None:
        with hold_lease(storage, directory):
            release.wait(timeout=60)

    holder = threading.Thread(target=hold)
    holder.start()
    while not storage.list(directory):
        time.sleep(0.01)
    process = subprocess.Popen(
        [cli_program(), "run", str(tiny_config), "--set", "cluster.num_cpus=2"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    release.set()
    holder.join()
    assert "waiting for process" in line
    assert "its lease ends in" in line


def cli_program() -> str:
    import sys

    return str(Path(sys.executable).parent / "raydiffusion")
