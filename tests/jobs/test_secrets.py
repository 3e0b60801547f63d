"""What a webhook's URL must never be written into: records, pages, and jobs on a cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs import retrain
from jobs.cli import app
from pipeline.config import load_config
from pipeline.errors import ClusterError, ConfigError
from pipeline.retrain import Cycle

TOKEN = "T0KEN-of-a-webhook"
HOOK = f"http://127.0.0.1:1/{TOKEN}"  # where nobody listens
NO_CLUSTER = "cluster.address=127.0.0.1:1"
# As one key, and as the whole section.
SECRETS = (f"notify.on_promote={HOOK}", f'notify={{on_promote = "{HOOK}"}}')


def files_with_token(root: Path) -> list[str]:
    """The files below a directory that hold the token; there are some that do not."""
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_run_keeps_no_webhook(
    tiny_config: Path, run_cli: Callable[..., Any], secret: str
) -> None:
    cwd = tiny_config.parent
    done = run_cli("run", str(tiny_config), "--set", secret, "--set", NO_CLUSTER, cwd=cwd)
    assert done.returncode == ClusterError.exit_code, done.stderr
    assert "cluster.address" in next((cwd / "runs" / "runs").glob("*/run.json")).read_text()
    assert files_with_token(cwd / "runs") == []
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("secret", SECRETS)
def test_a_cycle_is_given_no_webhook_for_its_pages(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    commands = []

    def keep_command(config: Any, *, command: str, **_: Any) -> Cycle:
        commands.append(command)
        assert config.notify.on_promote == HOOK
        return Cycle("nothing_new", "Nothing new.")

    monkeypatch.setattr(retrain, "retrain_model", keep_command)
    options = ["--set", secret, "--set", NO_CLUSTER]
    done = CliRunner().invoke(app, ["retrain", str(tiny_config), *options])
    assert done.exit_code == 0, done.output
    assert commands == [f"run {tiny_config} --set {NO_CLUSTER}"]


def test_what_is_submitted_has_no_webhook(tiny_config: Path, run_cli: Callable[..., Any]) -> None:
    cwd = tiny_config.parent
    for secret in SECRETS:
        done = run_cli("submit", "run", str(tiny_config), "--set", secret, cwd=cwd)
        assert done.returncode == 2
        assert "has a URL, which all who may look at the cluster's jobs" in done.stderr
        assert "Write 'env:NAME'" in done.stderr
        assert TOKEN not in done.stdout + done.stderr
    tiny_config.write_text(f'{tiny_config.read_text()}\n[notify]\non_promote = "{HOOK}"\n')
    replaced = ("--set", "notify.on_promote=env:HOOK")  # the file goes along as it is
    done = run_cli("submit", "run", str(tiny_config), *replaced, cwd=cwd)
    assert (done.returncode, "notify.on_promote in" in done.stderr) == (2, True)


@pytest.mark.parametrize("override", [f'notify="{HOOK}"', f"notify.on_promote.x.y={HOOK}"])
def test_a_url_in_the_wrong_place_is_not_shown(override: str, tiny_config: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(tiny_config, ["notify.on_promote=env:X", override])
    assert "notify" in str(raised.value)
    assert HOOK not in str(raised.value)
