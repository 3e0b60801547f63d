"""Jobs on a real head with its dashboard and a token: submitted, followed, stopped, killed."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.leases import hold_lease
from pipeline.storage import LocalStorage

from .clusters import DEADLINE_S, Head, ray_head_in, short_directory, wait_for
from .conftest import ROOT, cli_program


class Proxy:
    """A way to a port that can be cut off."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Ends all connections; new ones are let through."""
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pass_on, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def ray_head() -> Iterator[Head]:
    """A head with two CPUs, its dashboard and a token of its own."""
    with short_directory() as temp, ray_head_in(temp, {}, num_cpus=2) as head:
        yield head


@pytest.fixture
def cli(ray_head: Head, tmp_path: Path, run_cli: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a verb of jobs against the head."""

    def run(verb: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_cli(
            verb, "--address", ray_head.address, *args,
            cwd=tmp_path, timeout=DEADLINE_S, env={**ray_head.environment, **environment},
        )  # fmt: skip

    return run


@contextlib.contextmanager
def following(
    head: Head, path: Path, *args: str, port: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A command that follows a job, and the file of what it prints."""
    output = path / f"{secrets.token_hex(4)}.log"
    with output.open("w") as file:
        process = subprocess.Popen(
            [cli_program(), *args, "--address", f"http://127.0.0.1:{port or head.port}"]
            if args[0] == "attach"
            else [cli_program(), "submit", "--address", f"http://127.0.0.1:{port or head.port}",
                  *args],
            cwd=path, env={**os.environ, **head.environment}, stdout=file,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        yield process, output
    finally:
        process.kill()
        process.wait(timeout=10)


@contextlib.contextmanager
def held(config: Path) -> Iterator[None]:
    """Holds the run's lease, so that a job of it waits, which costs nothing."""
    loaded = load_config(config, [f"storage.root={config.parent / 'runs'}"])
    run = make_plan(loaded, ("preprocess",)).run
    with hold_lease(LocalStorage(str(config.parent / "runs")), f"runs/{run}"):
        yield


def log_of(text: str) -> str:
    """What the job printed, of what a command that follows it printed."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("job tiny-", "connect")))


@pytest.fixture
def one_shard(tiny_config: Path) -> Path:
    text = tiny_config.read_text().replace("digits-*.tar", "digits-0000.tar")
    tiny_config.write_text(text)
    return tiny_config


def test_a_job_is_submitted_once_followed_and_stopped(
    ray_head: Head, one_shard: Path, cli: Callable[..., Any]
) -> None:
    path = one_shard.parent
    proxy = Proxy(ray_head.port)
    with following(ray_head, path, "preprocess", "tiny.toml", port=proxy.port) as (first, output):
        with held(one_shard):
            wait_for(lambda: "waiting for process" in output.read_text())
            again = cli("submit", "--no-wait", "--json", "preprocess", "tiny.toml")
            proxy.cut()
            wait_for(lambda: "connected again" in output.read_text())
        assert first.wait(timeout=DEADLINE_S) == 0, output.read_text()
    proxy.close()
    assert again.returncode == 0, again.stderr
    job = json.loads(again.stdout)
    assert not job["is_new"]
    text = output.read_text()
    assert f"job {job['id']} submitted (" in text
    assert f"job {job['id']} succeeded, exit code 0" in text
    assert "connection lost, trying again" in text
    attached = cli("attach", job["id"])
    assert attached.returncode == 0
    assert log_of(attached.stdout) == log_of(text)
    assert log_of(text).count("preprocess done in") == 1
    assert [p.name for p in (path / "runs" / "steps" / "preprocess").iterdir()]

    wrong = ("preprocess", "tiny.toml", "--set", "data.sources=['nothing-*.tar']")
    failed = cli("submit", "--json", *wrong)
    assert failed.returncode == 3
    assert json.loads(failed.stdout)["exit_code"] == 3
    assert "error: There are no images at" in failed.stderr
    listed = cli("jobs", "--json")
    known = {job["id"]: job for job in json.loads(listed.stdout)["jobs"]}
    assert [job["exit_code"] for job in known.values()] == [0, 3]
    token = ray_head.environment["RAY_AUTH_TOKEN"]
    assert token not in listed.stdout + text + failed.stderr
    kept = [p for p in (path / "runs").rglob("*") if p.is_file()]
    assert not [p for p in kept if token.encode() in p.read_bytes()]


@pytest.mark.slow
def test_refusals_and_what_ends_a_job_or_only_its_follower(
    ray_head: Head, one_shard: Path, cli: Callable[..., Any]
) -> None:
    path = one_shard.parent
    refused = cli("jobs", RAY_AUTH_TOKEN="f" * 32)
    assert refused.returncode == 7
    assert "refuses the token" in refused.stderr
    unsaid = cli("jobs", RAY_AUTH_MODE="disabled")
    assert unsaid.returncode == 7
    assert "wants a token, and none was sent. Set RAY_AUTH_MODE=token" in unsaid.stderr
    unknown = cli("attach", "nothing-1")
    assert (unknown.returncode, "knows no job nothing-1" in unknown.stderr) == (2, True)

    with held(one_shard):
        # Ctrl-C: the follower leaves, the job goes on.
        with following(ray_head, path, "preprocess", "tiny.toml") as (process, output):
            wait_for(lambda: "waiting for process" in output.read_text())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
        text = output.read_text()
        assert "Detached; the job goes on" in text
        (job,) = json.loads(cli("jobs", "--json").stdout)["jobs"]
        assert job["status"] == "RUNNING"
        assert f"raydiffusion attach {job['id']} --address {ray_head.address}" in text
        assert f"raydiffusion stop {job['id']} --address {ray_head.address}" in text

        # Stop: who follows is told, 130.
        with following(ray_head, path, "attach", job["id"]) as (process, output):
            wait_for(lambda: "waiting for process" in output.read_text())
            stopped = cli("stop", job["id"])
            assert (stopped.returncode, "ended: stopped" in stopped.stdout) == (0, True)
            assert process.wait(timeout=60) == 130
        assert "had ended before" in cli("stop", job["id"]).stdout

        # The job's process is killed: 137, and the next attempt is another job.
        with following(ray_head, path, "preprocess", "tiny.toml") as (process, output):
            wait_for(lambda: "waiting for process" in output.read_text())
            os.kill(ray_head.find_driver(), signal.SIGKILL)
            assert process.wait(timeout=60) == 137
        assert f"{job['id'].removesuffix('-1')}-2 failed, exit code 137" in output.read_text()

        # The head is killed: who follows gives up with what to do.
        options = ("--patience", "3", "preprocess", "tiny.toml")
        with following(ray_head, path, *options) as (process, output):
            wait_for(lambda: "waiting for process" in output.read_text())
            ray_head.kill()
            assert process.wait(timeout=60) == 7
        assert "gave no answer for 3 s" in output.read_text()
    gone = cli("submit", "preprocess", "tiny.toml")
    assert (gone.returncode, "does not answer" in gone.stderr) == (7, True)


@pytest.mark.slow
def test_an_extractor_of_ones_own_goes_along(
    ray_head: Head, one_shard: Path, cli: Callable[..., Any]
) -> None:
    home = one_shard.parent / "home"
    home.mkdir()
    (home / "own_pixels.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), Half())\n"
        "class Half(nn.Module):\n"
        "    def forward(self, items):\n"
        "        return items[:, :4].float() / 255\n"
    )
    settings = ["features.extractor=own_pixels:make", "train.num_steps=20", "train.num_workers=1"]
    options = [word for text in settings for word in ("--set", text)]
    path = os.pathsep.join([str(home), str(ROOT)])
    done = cli("submit", "run", "tiny.toml", *options, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fid[own_pixels:make]" in done.stdout
    assert list((one_shard.parent / "runs" / "runs").glob("*/report.html"))
    again = cli("submit", "run", "tiny.toml", *options, PYTHONPATH=path)
    assert "Everything was there already" in again.stdout
