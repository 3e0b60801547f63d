"""What nodes answer, and what is refused for it: with answers made up here."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import node_checks
from pipeline.capacity import Note
from pipeline.cluster import Node
from pipeline.errors import ClusterError, DataError, StorageError
from pipeline.node_checks import (
    check_answers,
    check_collectives,
    check_gpus,
    check_input,
    check_shared_memory,
    check_storage,
    check_temps,
    check_versions,
    judge_temp,
)
from pipeline.object_storage import ObjectStorage
from pipeline.probes import BUSY, UNSHARED, Facts, Question, look
from pipeline.settings import Config, DataConfig, TrainConfig
from pipeline.storage import open_storage

A = Node(4, 0, "a", "10.0.0.1", object_store_bytes=1 << 30, temp="/tmp/ray")
B = Node(4, 0, "b", "10.0.0.2", object_store_bytes=1 << 30, temp="/tmp/ray")
GIB = 1 << 30


def config(**train: object) -> Config:
    return Config(
        name="t",
        data=DataConfig(sources=("x",), resolution=8),
        train=TrainConfig.model_validate({"global_batch_size": 960, **train}),
    )


@pytest.fixture(scope="module")
def well() -> Facts:
    """The answer of a node that is as this machine, with plenty of everything."""
    return replace(
        look(Question()),
        host="a",
        host_address="10.0.0.1",
        interface=None,
        shm_bytes=16 * GIB,
        temp_free_bytes=50 * GIB,
        temp_total_bytes=100 * GIB,
        backends=("gloo", "nccl"),
    )


def test_a_node_that_answers_is_well(well: Facts) -> None:
    assert check_answers({A: well, B: well}) == "2 nodes ran a task"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (TimeoutError("no answer within 60 s"), r"^Node 10\.0\.0\.2 gave no answer within 60 s to"),
        (
            ModuleNotFoundError("No module named 'torch'\nand so on"),
            r"^Node 10\.0\.0\.2 cannot run a task of this project: ModuleNotFoundError: No module "
            r"named 'torch'\. Install the same there",
        ),
        (OSError(), r"OSError: \. Install"),
    ],
)
def test_a_node_that_does_not_answer_is_refused(
    well: Facts, answer: Exception, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        check_answers({A: well, B: answer})


def test_a_root_that_a_node_does_not_share_is_refused(well: Facts, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    unshared = replace(well, storage_fault=UNSHARED)
    with pytest.raises(StorageError) as caught:
        check_storage(storage, {A: well, B: unshared}, unseen=())
    assert str(caught.value) == (
        f"Node 10.0.0.2 does not find below the storage root {tmp_path} what this process wrote "
        "there. Set storage.root to a directory that every node mounts, or to an object store such "
        "as s3://bucket/runs."
    )
    with pytest.raises(StorageError, match=r"nor do 1 more nodes"):
        check_storage(storage, {A: unshared, B: unshared}, unseen=())
    with pytest.raises(StorageError, match="See that it is the same store for all of them"):
        check_storage(ObjectStorage("s3://b/x"), {A: unshared}, unseen=())


def test_a_root_that_a_node_cannot_write_is_refused(well: Facts, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    denied = replace(well, storage_fault="Cannot write /x: Permission denied. Check the path.")
    with pytest.raises(StorageError, match=r"^On node 10\.0\.0\.2: Cannot write /x: Permission"):
        check_storage(storage, {A: well, B: denied}, unseen=())


def test_what_a_node_writes_must_be_found_here(well: Facts, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with pytest.raises(StorageError, match=r"What node 10\.0\.0\.2 wrote .* is not found here\. S"):
        check_storage(storage, {A: well, B: well}, unseen=[B])
    assert check_storage(storage, {A: well, B: well}, ()) == f"2 nodes read and wrote {tmp_path}"


def test_sources_that_a_node_cannot_read_are_refused(well: Facts) -> None:
    fault = "Cannot read /data/a.tar: No such file or directory. Check that it exists."
    with pytest.raises(DataError, match=r"^On node 10\.0\.0\.2: Cannot read /data/a\.tar.* Every"):
        check_input({A: well, B: replace(well, input_fault=fault)})


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"python": "3.11.0"}, f"has python 3.11.0, and this process {platform.python_version()}"),
        ({"torch": "1.0"}, r"has torch 1\.0, and this process .* Install the same there"),
        ({"ray": None}, r"has no ray, and this process"),
        ({"pyarrow": None}, r"has no pyarrow, and this process"),
    ],
)
def test_other_versions_are_refused(
    well: Facts, there: dict[str, str | None], message: str
) -> None:
    versions = {k: v for k, v in {**well.versions, **there}.items() if v is not None}
    with pytest.raises(ClusterError, match=f"^Node 10.0.0.2 {message}"):
        check_versions({A: well, B: replace(well, versions=versions)})


def test_other_code_is_refused_and_another_build_of_torch_is_not(well: Facts) -> None:
    cuda = {**well.versions, "torch": well.versions["torch"].split("+")[0] + "+cu130"}
    detail = check_versions({A: well, B: replace(well, versions=cuda)})
    assert detail.endswith(f"raydiffusion's code {well.code} everywhere")
    with pytest.raises(ClusterError, match="imports other code of raydiffusion"):
        check_versions({A: well, B: replace(well, code="0")})


def test_another_pillow_is_noted(well: Facts) -> None:
    versions = {**well.versions, "pillow": "1.0"}
    detail = check_versions({A: well, B: replace(well, versions=versions)})
    assert isinstance(detail, Note)
    assert "and 1.0 on node 10.0.0.2" in detail


def test_a_full_disk_is_refused_and_a_filling_one_noted(well: Facts) -> None:
    with pytest.raises(
        ClusterError, match=r"1\.0 MiB free at /t of node n, and Ray needs 256\.0 M"
    ):
        judge_temp("node n", "/t", free=1 << 20, size=100 * GIB)
    filling = replace(well, temp_free_bytes=4 * GIB)
    detail = check_temps({A: well, B: filling})
    assert isinstance(detail, Note)
    assert "4.0 GiB free at /tmp/ray of node 10.0.0.2, less than 5%" in detail
    assert not isinstance(check_temps({A: well}), Note)


def test_shared_memory_must_hold_the_object_stores_of_a_host(well: Facts) -> None:
    small = replace(well, shm_bytes=64 << 20)  # what Docker gives
    detail = check_shared_memory(config(), {A: small}, True)
    assert isinstance(detail, Note)
    assert "has 64.0 MiB, and Ray's object store 1.0 GiB: Ray keeps it on disk" in detail
    assert "--shm-size=1g" in detail
    both = {A: replace(well, shm_bytes=GIB), B: replace(well, shm_bytes=GIB)}
    assert isinstance(check_shared_memory(config(), both, True), Note)
    apart = both | {B: replace(well, shm_bytes=GIB, host="b")}
    assert not isinstance(check_shared_memory(config(), apart, True), Note)
    assert check_shared_memory(config(), {A: replace(well, shm_bytes=None)}, True)


@pytest.mark.parametrize(("workers", "notes"), [(1, False), (2, True)])
def test_gpus_of_a_host_need_shared_memory_beside(well: Facts, workers: int, notes: bool) -> None:
    node = replace(A, gpus=2)
    facts = {node: replace(well, shm_bytes=3 * GIB // 2)}
    train = config(use_gpu=True, num_workers=workers)
    detail = check_shared_memory(train, facts, True)
    assert isinstance(detail, Note) == notes
    assert ("--shm-size=2g" in detail) == notes
    assert not isinstance(check_shared_memory(train, facts, False), Note)


def test_a_store_that_grows_with_the_shared_memory_is_to_be_limited(well: Facts) -> None:
    node = replace(A, gpus=2, object_store_bytes=95 * GIB // 10)
    train = config(use_gpu=True, num_workers=2)
    detail = check_shared_memory(train, {node: replace(well, shm_bytes=10 * GIB)}, True)
    assert f"Start Ray there with --object-store-memory={9 * GIB}" in detail
    limited = replace(node, object_store_bytes=9 * GIB)
    detail = check_shared_memory(train, {limited: replace(well, shm_bytes=10 * GIB)}, True)
    assert not isinstance(detail, Note)


@pytest.mark.parametrize(("use_gpu", "backends"), [(True, ("gloo",)), (False, ())])
def test_torch_without_the_backend_is_refused(
    well: Facts, use_gpu: bool, backends: tuple[str, ...]
) -> None:
    facts = {replace(A, gpus=1): replace(well, backends=backends)}
    with pytest.raises(ClusterError, match=r"has no (nccl|gloo), which workers use to agree"):
        check_collectives(config(use_gpu=use_gpu), facts)


@pytest.mark.parametrize("address", ["127.0.1.1", None])
def test_gloo_on_the_loopback_is_refused_where_workers_need_several_hosts(
    well: Facts, address: str | None
) -> None:
    facts = {A: well, B: replace(well, host="b", host_address=address)}
    with pytest.raises(ClusterError, match=r"one host has room for 4 of 5 workers\. Correct /etc"):
        check_collectives(config(num_workers=5), facts)
    noted = check_collectives(config(num_workers=4), facts)  # they may be on one, or not
    assert isinstance(noted, Note)
    assert f"means {address or 'no address'} there" in noted
    for fine in (
        facts | {B: replace(facts[B], interface="eth0")},
        facts | {B: replace(facts[B], host="a")},
    ):
        assert check_collectives(config(num_workers=5), fine) == "gloo is there on 2 nodes"
    assert not isinstance(check_collectives(config(num_workers=1), facts), Note)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], r"torch sees no GPU on node 10\.0\.0\.1, where Ray counts 1\. Install the CUDA build"),
        (TimeoutError("no answer"), r"where Ray counts 1: TimeoutError\. Install"),
    ],
)
def test_gpus_that_torch_does_not_see_are_refused(
    monkeypatch: pytest.MonkeyPatch, answer: object, message: str
) -> None:
    node = replace(A, gpus=1)
    monkeypatch.setattr(node_checks, "ask", lambda *_, **__: {node: answer})
    with pytest.raises(ClusterError, match=message):
        check_gpus(config(use_gpu=True), [node], False, True, ["train.use_gpu"])


def test_gpus_that_only_draw_need_no_room_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    node, wanted = replace(A, gpus=1), ["evaluate.use_gpu"]
    monkeypatch.setattr(node_checks, "ask", lambda *_, **__: {node: [("small", 1 << 20)]})
    detail = check_gpus(config(), [node], False, True, wanted)
    assert detail == "torch sees small of 1.0 MiB on node 10.0.0.1"
    assert not isinstance(detail, Note)
    monkeypatch.setattr(node_checks, "ask", lambda *_, **__: {node: []})
    with pytest.raises(ClusterError, match=r"or set evaluate\.use_gpu = false\.$"):
        check_gpus(config(), [node], False, True, wanted)
    monkeypatch.setattr(node_checks, "ask", lambda nodes, *_, **__: dict.fromkeys(nodes))
    assert check_gpus(config(), [A], False, True, wanted) == "no node has a GPU to look at"


@pytest.mark.parametrize(
    ("answer", "expected", "notes"),
    [
        ([("H200", 140 * GIB)], "torch sees H200 of 140.0 GiB on node 10.0.0.1", False),
        ([("small", 1 << 20)], "small on node 10.0.0.1 has 1.0 MiB, less than the", True),
        (BUSY, "the GPUs of node 10.0.0.1 are in use just now, and not looked at", True),
    ],
)
def test_gpus_are_named_and_compared(
    monkeypatch: pytest.MonkeyPatch, answer: object, expected: str, notes: bool
) -> None:
    node = replace(A, gpus=1)
    monkeypatch.setattr(node_checks, "ask", lambda *_, **__: {node: answer})
    detail = check_gpus(config(use_gpu=True), [node], False, True, ["train.use_gpu"])
    assert expected in detail
    assert isinstance(detail, Note) == notes


@pytest.mark.parametrize("opens", [True, False])
def test_a_machine_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ClusterError, match=r"torch sees no GPU on node 10\.0\.0\.1"):
        check_gpus(config(use_gpu=True), [A], True, opens, ["train.use_gpu"])
