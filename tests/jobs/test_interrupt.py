import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_at_once_and_says_how_to_go_on(
    tiny_config: Path, ray_cluster: str, number: signal.Signals
) -> None:
    program = str(Path(sys.executable).parent / "raydiffusion")
    process = subprocess.Popen(
        [program, "run", str(tiny_config), "--set", f"cluster.address={ray_cluster}"],
        cwd=tiny_config.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("preprocess 0 of 4"):
            process.send_signal(number)
            break
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    status = subprocess.run(
        [program, "status"], cwd=tiny_config.parent, capture_output=True, text=True, timeout=60
    )
    assert "interrupted" in status.stdout
