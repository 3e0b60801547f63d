"""`submit` against a cluster that only remembers: what is sent, and what is said."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs import exit_codes, submit
from jobs.cli import app
from jobs.tune import command_of
from pipeline.cluster_jobs import Job
from pipeline.submission import SUBMITTED_AS

ADDRESS = "http://127.0.0.1:1"


class Server:
    """A cluster on this machine, all of whose jobs are pending."""

    submitted: dict[str, str]

    def __init__(self, address: str) -> None:
        self.address = address

    def is_here(self) -> bool:
        return True

    def jobs(self) -> list[Job]:
        return [self.job(job_id) for job_id in self.submitted]

    def job(self, job_id: str) -> Job:
        return Job(job_id, "PENDING", self.submitted[job_id], "", None, None, None, {})

    def submit(
        self, job_id: str, *, entrypoint: str, directory: Path, metadata: Mapping[str, str]
    ) -> bool:
        assert (directory / metadata["config"]).is_file()
        self.submitted[job_id] = entrypoint
        return True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(Server, "submitted", {}, raising=False)
    monkeypatch.setattr(submit, "JobServer", Server)
    return Server


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["submit", "--address", ADDRESS, *map(str, arguments)])


def test_a_reference_is_accepted_as_a_job(server: type[Server], tiny_config: Path) -> None:
    done = run("--no-wait", "accept-reference", tiny_config, "--reason", "a new pen")
    assert done.exit_code == 0, done.output
    ((job_id, entrypoint),) = server.submitted.items()
    assert job_id.startswith("tiny-accept-reference-")
    assert f"job {job_id} submitted (" in done.output
    _, _, known, *words = shlex.split(entrypoint)
    words = words[2:]
    assert known == f"{SUBMITTED_AS}=submit --address {ADDRESS} run {tiny_config}"
    assert words[:5] == ["jobs", "accept-reference", "tiny.toml", "--reason", "a new pen"]
    assert words[-1] == "cluster.address=$RAY_ADDRESS"


def test_a_page_made_in_a_job_says_how_to_submit_and_not_the_job_s_paths(
    server: type[Server], tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--set", "train.num_steps=7", "--set", "notify.on_failure='env:HOOK'", "--json"]
    done = run("--no-wait", "--shared-paths", "tune", tiny_config, *given)
    assert done.exit_code == 0, done.output
    ((_, entrypoint),) = server.submitted.items()
    name, _, value = shlex.split(entrypoint)[2].partition("=")
    monkeypatch.setenv(name, value)
    assert command_of(Path("tiny.toml"), ["cluster.address=x"]) == (
        f"submit --address {ADDRESS} --shared-paths run {tiny_config} --set train.num_steps=7"
    )


def test_a_model_cannot_be_accepted_for_by_name_as_a_job(server: type[Server]) -> None:
    done = run("accept-reference", "tiny")
    assert (done.exit_code, "There is no config file at tiny" in done.output) == (2, True)
    assert server.submitted == {}


def test_left_before_it_follows_it_says_that_the_job_may_run(
    server: type[Server], tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    def interrupt(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(exit_codes.os, "_exit", leave)
    monkeypatch.setattr(server, "submit", interrupt)  # the cluster may have it, or not
    done = run("run", tiny_config)
    assert done.exit_code == 130
    assert "If the job was submitted already, it goes on" in done.output
    assert f"raydiffusion jobs --address {ADDRESS}" in done.output
