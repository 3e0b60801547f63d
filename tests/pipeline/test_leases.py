import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import leases
from pipeline.errors import BusyError
from pipeline.leases import await_release, find_living, hold_alone, hold_lease, read_holder
from pipeline.processes import process_started
from pipeline.storage import LocalStorage, open_storage

HOLD = (
    "import sys; from pipeline.leases import hold_lease; "
    "from pipeline.storage import open_storage\n"
    "with hold_lease(open_storage(sys.argv[1]), 'd'): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    opened = open_storage(str(tmp_path))
    assert isinstance(opened, LocalStorage)
    return opened


def start_holder(storage: LocalStorage, *inside: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*inside, sys.executable, "-c", HOLD, storage.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def finish(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=10)


def put_elsewhere(storage: LocalStorage, *, ahead_s: float, beats: int = 3) -> None:
    """A holder on another host, whose clock is wrong; as they were written before places were."""
    holder = {
        "host": "elsewhere", "boot_id": "x", "pid": 1, "process_started": 1, "beats": beats,
        "beat_at": time.time() + ahead_s, "released": False,
    }  # fmt: skip
    storage.replace("d/lease-000004.json", json.dumps(holder).encode())


@pytest.fixture
def beats_elsewhere(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[float], None]]:
    """Starts a holder on another host, whose clock is so many seconds ahead, and which beats."""
    monkeypatch.setattr(leases, "POLL_S", 0.02)
    stop, threads = threading.Event(), []

    def start(ahead_s: float) -> None:
        def beat() -> None:
            beats = 0
            while not stop.wait(0.05):
                beats += 1
                put_elsewhere(storage, ahead_s=ahead_s, beats=beats)

        put_elsewhere(storage, ahead_s=ahead_s)
        threads.append(threading.Thread(target=beat))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def test_another_process_is_told_who_holds_it(storage: LocalStorage) -> None:
    process = start_holder(storage)
    try:
        with (
            pytest.raises(BusyError, match=f"Process {process.pid} on .* is working on d"),
            hold_lease(storage, "d", wait=False),
        ):
            pass
        holder = read_holder(storage, "d")
        assert holder is not None
        assert holder["pid"] == process.pid
    finally:
        finish(process)
    assert read_holder(storage, "d") is None
    with hold_lease(storage, "d", wait=False) as held:
        assert held


def test_a_killed_holder_is_replaced_at_once(storage: LocalStorage) -> None:
    process = start_holder(storage)
    process.kill()
    process.wait(timeout=10)
    waits: list[float] = []
    with hold_lease(storage, "d", on_wait=lambda _, left_s: waits.append(left_s)) as held:
        assert held
    assert waits == []
    finish(process)


def test_waits_with_a_countdown_until_the_holder_is_done(storage: LocalStorage) -> None:
    process = start_holder(storage)
    waits: list[float] = []

    def on_wait(holder: dict[str, Any], left_s: float) -> None:
        waits.append(left_s)
        finish(process)

    with hold_lease(storage, "d", on_wait=on_wait) as held:
        assert held
    assert waits
    assert 0 < waits[0] <= leases.LIFE_S


def test_a_silent_holder_on_another_host_expires_by_our_clock(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LIFE_S", 0.3)
    monkeypatch.setattr(leases, "POLL_S", 0.05)
    put_elsewhere(storage, ahead_s=1e6)
    waits: list[float] = []
    with hold_lease(storage, "d", on_wait=lambda _, left_s: waits.append(left_s)) as held:
        assert held
    assert waits == sorted(waits, reverse=True)
    assert len(waits) > 1
    assert storage.list("d") == ["lease-000005.json"]


def test_a_reused_process_id_is_not_the_holder(storage: LocalStorage) -> None:
    with hold_lease(storage, "other"):
        document = json.loads(storage.read("other/lease-000001.json"))
    document |= {"released": False, "process_started": document["process_started"] - 1}
    storage.create("d/lease-000001.json", json.dumps(document).encode())
    assert document["pid"] == os.getpid()
    assert read_holder(storage, "d") is None
    with hold_lease(storage, "d", wait=False) as held:
        assert held


def test_one_of_many_contenders_holds_at_a_time(storage: LocalStorage) -> None:
    inside, most = [0], [0]
    lock = threading.Lock()

    def contend() -> None:
        with hold_lease(storage, "d"):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_number_that_came_and_went_is_not_taken(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between this contender's look and its creation of number 1, others held 1, 2 and 3, and the
    # file of 1 is gone again.
    process = start_holder(storage)
    number_3 = storage.read("d/lease-000001.json")
    storage.create("d/lease-000003.json", number_3)
    storage.delete("d/lease-000001.json")
    looks = iter([[]])
    real = leases._names
    monkeypatch.setattr(leases, "_names", lambda *a: next(looks, real(*a)))
    with pytest.raises(BusyError), hold_lease(storage, "d", wait=False):
        pass
    assert storage.list("d") == ["lease-000003.json"]
    process.kill()
    process.wait(timeout=10)
    finish(process)


def test_waiting_ends_when_the_work_is_done(storage: LocalStorage) -> None:
    process = start_holder(storage)
    try:
        with hold_lease(storage, "d", is_done=lambda: True) as held:
            assert not held
    finally:
        finish(process)


@pytest.mark.parametrize("ahead_s", [0.0, -3600.0, 3600.0])
def test_of_one_who_lives_elsewhere_the_clock_tells_nothing(
    storage: LocalStorage, beats_elsewhere: Callable[[float], None], ahead_s: float
) -> None:
    beats_elsewhere(ahead_s)
    message = "Process 1 on elsewhere keeps it already. Wait for it."
    with (
        pytest.raises(BusyError, match=message),
        hold_alone(storage, "d", "keeps it", remedy="Wait for it."),
    ):
        pass
    assert find_living(storage, ["d", "none"]) == {"d"}


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_nor_of_one_who_died_there(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    monkeypatch.setattr(leases, "LIFE_S", 0.3)
    monkeypatch.setattr(leases, "POLL_S", 0.05)
    put_elsewhere(storage, ahead_s=ahead_s)
    assert find_living(storage, ["d"]) == set()
    with hold_alone(storage, "d", "keeps it"):
        assert storage.list("d") == ["lease-000004.json", "lease-000005.json"]
    put_elsewhere(storage, ahead_s=ahead_s)
    storage.delete("d/lease-000005.json")
    assert await_release(storage, "d")


def test_one_in_another_container_of_this_host_is_not_taken_for_dead(
    storage: LocalStorage,
) -> None:
    inside = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("another namespace of process ids can be made by root on Linux only")
    process = start_holder(storage, *inside)
    try:
        document = json.loads(storage.read("d/lease-000001.json"))
        assert process_started(document["pid"]) != document["process_started"]  # another's here
        assert read_holder(storage, "d") == document
        assert find_living(storage, ["d"]) == {"d"}
        with pytest.raises(BusyError), hold_lease(storage, "d", wait=False):
            pass
    finally:
        finish(process)
