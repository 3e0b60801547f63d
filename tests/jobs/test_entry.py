"""Another package called `pipeline` in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.entry import find_shadow


def test_all_packages_are_our_own() -> None:
    assert find_shadow() is None


@pytest.mark.parametrize("package", ["pipeline", "diffusion_core"])
def test_a_shadowing_package_is_named_in_one_sentence(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    program = str(Path(sys.executable).parent / "raydiffusion")
    done = subprocess.run(
        [program, "status"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"The package {package!r} was found at {tmp_path / package}" in done.stderr
    assert "PYTHONPATH" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_directory_with_its_own_pipeline_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('not ours')")
    program = str(Path(sys.executable).parent / "raydiffusion")
    done = subprocess.run(
        [program, "status"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "There are no runs" in done.stdout
