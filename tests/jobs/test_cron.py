"""The process of `cron`: what it refuses, and how a signal ends it and what it runs."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from jobs.cron import Runner
from pipeline.leases import hold_lease, read_holder
from pipeline.storage import LocalStorage
from pipeline.timetable import read_state

from ..conftest import cli_program

SECRET = "https://example.org/T0KEN"
FAR = ("--at", "0 3 1 1 *", "--timezone", "UTC")


@contextmanager
def started(*args: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [cli_program(), "cron", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines up to the one that holds a text; the process must not hang."""
    assert process.stdout is not None
    timer = threading.Timer(60, process.kill)
    timer.start()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    timer.cancel()
    assert lines, "it said nothing"
    assert text in lines[-1], "".join(lines)
    return lines


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--at", "0 25 * * *"), "is no cron expression"),
        ((*FAR, "--verb", "promote"), "cron takes one of retrain, run, "),
        ((), "Missing option '--at'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_config: Path, run_cli: Callable[..., Any], options: tuple[str, ...], sentence: str
) -> None:
    done = run_cli("cron", str(tiny_config), *options, cwd=tiny_config.parent)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tiny_config.parent / "runs").exists()


def test_a_failure_is_kept_and_a_signal_ends_it_while_it_waits(tiny_config: Path) -> None:
    nothing = ("--set", "cluster.address=127.0.0.1:1", "--set", f"notify.on_success={SECRET}")
    options = (str(tiny_config), *FAR, *nothing, "--verb", "preprocess", "--once-now", "--json")
    storage = LocalStorage(str(tiny_config.parent / "runs"))
    with started(*options, cwd=tiny_config.parent) as process:
        lines = read_until(process, '"event": "waiting"')
        second = subprocess.run(
            [cli_program(), "cron", *options], cwd=tiny_config.parent, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        process.send_signal(signal.SIGINT)
        rest = read_until(process, '"event": "stopped"')
        assert process.wait(timeout=30) == 130
    events = [json.loads(line) for line in [*lines, *rest] if line.startswith('{"time"')]
    assert [e["event"] for e in events] == ["started", "failed", "waiting", "stopped"]
    assert events[1]["exit_code"] == 7
    assert any("Ray at 127.0.0.1:1 cannot be used" in line for line in lines)
    kept = [path for path in (tiny_config.parent / "runs").rglob("*") if path.is_file()]
    assert [path for path in kept if path.name == "run.json"]
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []
    state = read_state(storage, "tiny")
    assert state is not None
    assert (state.failures, state.at) == (1, FAR[1])
    assert state.due == events[2]["due"]
    assert second.returncode == 8
    assert f"Process {process.pid} on " in second.stderr
    assert "keeps the timetable of tiny already" in second.stderr


def test_its_help_says_that_json_is_by_the_line(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_cli("cron", "--help", cwd=tmp_path, env={"COLUMNS": "200"})
    assert "one JSON object a line" in done.stdout


def test_a_signal_ends_what_runs_and_leaves_it_due(
    tiny_config: Path, run_cli: Callable[..., Any]
) -> None:
    cwd = tiny_config.parent
    planned = json.loads(run_cli("plan", str(tiny_config), "--json", cwd=cwd).stdout)
    storage = LocalStorage(str(cwd / "runs"))
    with hold_lease(storage, f"runs/{planned['run']}"):  # so that it waits, for this process
        options = (str(tiny_config), *FAR, "--verb", "run", "--once-now")
        with started(*options, cwd=cwd) as process:
            lines = read_until(process, "waiting for process")
            process.send_signal(signal.SIGTERM)
            lines += read_until(process, "stopped; what is due stays due")
            assert process.wait(timeout=30) == 0
    text = "".join(lines)
    assert f"cron: runs run {tiny_config}" in text
    assert "the same command continues" in text
    assert "Traceback" not in text
    state = read_state(storage, "tiny")
    assert state is not None
    assert (state.failures, state.last, state.running_since) == (0, None, None)
    assert read_holder(storage, "schedules/tiny") is None


def test_a_signal_may_come_at_any_moment_of_a_wait() -> None:
    """Between any two lines, of the library's as well; none may hold what the handler wants."""
    moments, ended = [0], threading.Event()

    def wait_interrupted_at(moment: int) -> bool:
        runner, lines = Runner([], quiet=True), [0]

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            lines[0] += event == "line"
            if lines[0] == moment and runner.signal is None:
                runner.on_signal(signal.SIGTERM, None)
            return trace

        sys.settrace(trace)
        try:
            runner.wait(0.001)
        finally:
            sys.settrace(None)
        was_interrupted = runner.signal is not None
        assert runner.wait(60.0 if was_interrupted else 0.0) == was_interrupted
        return was_interrupted

    def interrupt_everywhere() -> None:
        while wait_interrupted_at(moments[0] + 1):
            moments[0] += 1
        ended.set()

    threading.Thread(target=interrupt_everywhere, daemon=True).start()
    assert ended.wait(timeout=60), f"it hangs, interrupted at line {moments[0] + 1}"
    assert moments[0] > 0
