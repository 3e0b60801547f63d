"""The introductory examples run, print their number, and write their picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("example", "options", "number"),
    [
        ("s_curve", (), r"enough noise: distance .* samples to data \d+\.\d+ by DDPM"),
        ("sequence", ("--sample-steps=2",), r"strongest frequency: samples \d\.\d+, real \d\.\d+"),
        ("tiny_unet", ("--sample-steps=2",), r"without t: distance of samples to data \d+\.\d+"),
        ("straight_path", (), r"distance to data in 20 steps: \d+\.\d+"),
    ],
)
def test_an_example_prints_its_number_and_writes_its_picture(
    example: str, options: tuple[str, ...], number: str, tmp_path: Path
) -> None:
    script = ROOT / "examples" / example / f"{example}.py"
    picture = tmp_path / "picture.png"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "--num-steps=2", f"--output={picture}", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(number, done.stdout), done.stdout
    assert done.stdout.splitlines()[-1] == str(picture)
    with Image.open(picture) as image:
        assert image.width == 1040  # what the labels are laid out for
