import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import leases
from pipeline.errors import BusyError
from pipeline.leases import hold_lease, read_holder
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


def start_holder(storage: LocalStorage) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, storage.uri],
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
    elsewhere = {
        "host": "elsewhere", "boot_id": "x", "pid": 1, "process_started": 1, "beats": 3,
        "beat_at": time.time() + 1e6, "released": False,
    }  # fmt: skip
    storage.create("d/lease-000004.json", json.dumps(elsewhere).encode())
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
