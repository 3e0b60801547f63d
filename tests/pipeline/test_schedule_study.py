import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def test_draws_every_schedule_by_default(tmp_path: Path, call_cli: RunCli) -> None:
    done = call_cli("schedules", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["schedules"]}
    assert list(rows) == [
        "linear", "scaled_linear", "cosine", "sigmoid", "sqrt", "logistic", "lerp",
    ]  # fmt: skip
    assert rows["lerp"]["signal_left"] == 0
    # lerp: a/b < 1/10 where (t + 1)/T > 10/11
    assert rows["lerp"]["near_noise"] == pytest.approx(1 / 11, abs=1e-3)
    assert "never showed" in rows["logistic"]["warning"]
    page = (tmp_path / "schedules.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert page.count("<svg") == 1
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []


def test_draws_a_configs_schedule_beside_the_usual_ones(
    tiny_config: Path, call_cli: RunCli
) -> None:
    done = call_cli(
        "schedules", str(tiny_config), "--set", "diffusion.schedule=sigmoid", "--output", "x.html",
        "--json", cwd=tiny_config.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads(done.stdout)["schedules"]]
    assert names == ["sigmoid", "cosine", "linear"]
    assert (tiny_config.parent / "x.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("cosin",), 2, "schedule must be one of"),
        (("linear", "--timesteps", "10"), 2, "every beta must lie between 0 and 1"),
        (("cosine", "--image", "none.png"), 3, "Cannot read the image none.png"),
        (("cosine", "--output", "no/where.html"), 4, "Cannot write no/where.html"),
        (("cosine", "x.toml"), 2, "one config or names, not both"),
    ],
)
def test_refuses_in_one_sentence(
    tmp_path: Path, call_cli: RunCli, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = call_cli("schedules", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
