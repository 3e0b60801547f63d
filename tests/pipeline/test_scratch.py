import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.scratch import MARK, scratch_place


def test_neither_directory_nor_process_outlives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = signal.getsignal(signal.SIGTERM)
    code = "import sys; print(flush=True); sys.stdin.read()"
    processes: list[subprocess.Popen[str]] = []

    def fail_in_the_middle() -> None:
        with scratch_place() as (scratch, environment):
            (scratch / "file").touch()
            assert "RAY_ADDRESS" not in environment
            assert environment[MARK] not in os.environ.values()
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            processes.append(process)
            assert process.stdout is not None
            process.stdout.readline()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert processes[0].wait(timeout=10) == -signal.SIGKILL
    processes[0].communicate()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_being_terminated_clears_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit), scratch_place():
        signal.raise_signal(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
