"""The records of `retrain`, and that two do not retrain one model at once."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from pipeline.cycles import begin_cycle, end_cycle, hold_cycle, last_cycle
from pipeline.errors import BusyError
from pipeline.registry import Registry
from pipeline.storage import LocalStorage


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalStorage(str(tmp_path)), "m")


def test_the_latest_cycle_counts_and_knows_whether_it_is_over(registry: Registry) -> None:
    assert last_cycle(registry) is None
    first = begin_cycle(registry, {"key": "a"})
    found = last_cycle(registry)
    assert found is not None
    assert (found["number"], found["key"], found["outcome"]) == (1, "a", None)
    end_cycle(registry, first["number"], {"state": "kept"})
    end_cycle(registry, first["number"], {"state": "another"})  # what is recorded stays
    found = last_cycle(registry)
    assert found is not None
    assert found["outcome"]["state"] == "kept"
    begin_cycle(registry, {"key": "b"})
    found = last_cycle(registry)
    assert found is not None
    assert (found["number"], found["outcome"]) == (2, None)


def wait_inside(root: str, is_in: Any, may_leave: Any) -> None:
    """In a process of its own: retrains until told to leave."""
    with hold_cycle(Registry(LocalStorage(root), "m")):
        is_in.set()
        may_leave.wait(timeout=60)


def test_of_two_at_once_one_is_told(registry: Registry, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_in, may_leave = context.Event(), context.Event()
    process = context.Process(target=wait_inside, args=(str(tmp_path), is_in, may_leave))
    process.start()
    assert is_in.wait(timeout=60)
    message = rf"Process {process.pid} on \S+ retrains m, or pins another reference for it, already"
    with pytest.raises(BusyError, match=message), hold_cycle(registry):
        pass
    may_leave.set()
    process.join()
    with hold_cycle(registry):
        pass


def test_who_was_killed_holds_nobody_up(registry: Registry, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_in, may_leave = context.Event(), context.Event()
    process = context.Process(target=wait_inside, args=(str(tmp_path), is_in, may_leave))
    process.start()
    assert is_in.wait(timeout=60)
    process.kill()
    process.join()
    with hold_cycle(registry):
        pass
