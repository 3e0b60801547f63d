"""`import` and `export` from the command line: what is printed, and the exit codes."""

import json
import lzma
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parent.parent / "diffusion_core" / "fixtures"

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr


def test_a_checkpoint_goes_in_and_out(tmp_path: Path, call_cli: RunCli) -> None:
    checkpoint = lzma.decompress((FIXTURES / "2.3.4-images.pt.xz").read_bytes())
    (tmp_path / "model-3.pt").write_bytes(checkpoint)
    done = call_cli("import", "model-3.pt", "--output", "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "imported model-3.pt to m" in done.stdout
    assert "denoising-diffusion-pytorch 2.3.4" in done.stdout
    assert "sigmoid, 1,000 timesteps" in done.stdout
    assert "pred_v, weighting snr" in done.stdout
    done = call_cli("export", "m", "--output", "e", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["objective"] == "pred_v"
    scheduler = json.loads((tmp_path / "e" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert len(scheduler["trained_betas"]) == 1000
    done = call_cli("export", "m", "--output", "e", cwd=tmp_path)
    assert_refused(done, 2, "e is there already and not empty", "Give --output a new directory")


def test_a_scheduler_config_is_printed_as_toml(tmp_path: Path, call_cli: RunCli) -> None:
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    done = call_cli("import", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout) == {
        "diffusion": {
            "schedule": "cosine",
            "num_train_timesteps": 1000,
            "objective": "pred_noise",
        },
        "evaluate": {"spacing": "leading", "clip_x_start": True},
    }
    done = call_cli("import", ".", "--output", "m", cwd=tmp_path)
    assert_refused(done, 2, "is a scheduler config", "Leave them out")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("import", "none.pt", "--output", "m"), 3, "Cannot read none.pt"),
        (("import", "none.pt"), 2, "needs --output"),
        (("export", "no/where", "--output", "m"), 3, "a config (.toml), or a model's name."),
        (("export", "none", "--output", "m"), 2, "There is no model 'none' below "),
    ],
)
def test_wrong_targets(
    tmp_path: Path, call_cli: RunCli, arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert_refused(call_cli(*arguments, cwd=tmp_path), code, message)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_training_is_not_exported(tiny_config: Path, call_cli: RunCli) -> None:
    done = call_cli("export", str(tiny_config), "--output", "e", cwd=tiny_config.parent)
    assert_refused(done, 2, "is not finished: it never ran", "Run `raydiffusion train")
    assert not (tiny_config.parent / "e").exists()
