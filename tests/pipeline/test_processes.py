import os
import subprocess
import sys

from pipeline.processes import is_process_alive, is_tag_dead, process_tag


def test_a_tag_tells_whether_its_process_is_gone() -> None:
    assert is_tag_dead(process_tag()) is False
    code = "from pipeline.processes import process_tag; print(process_tag())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert is_tag_dead(done.stdout.strip()) is True


def test_a_process_id_that_another_process_has_now_is_dead() -> None:
    place, pid, started = process_tag().split("-")
    assert is_tag_dead(f"{place}-{pid}-{int(started) - 1}") is True


def test_a_process_elsewhere_is_not_judged() -> None:
    _, pid, started = process_tag().split("-")
    for tag in (f"{'0' * 12}-{pid}-{started}", "", "f", f"{process_tag()[:12]}-x-1"):
        assert is_tag_dead(tag) is None


def test_this_process_runs() -> None:
    assert is_process_alive(os.getpid())
