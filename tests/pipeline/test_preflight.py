"""The checks of a run, in their order: the first failure is raised, the notes are told."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import preflight, probes
from pipeline.cluster import Node, connect, max_temp_length
from pipeline.config import load_config
from pipeline.errors import ClusterError, ConfigError, StorageError
from pipeline.identities import InputFile
from pipeline.preflight import Check, before_ray, on_cluster, require
from pipeline.probes import BUSY, UNSHARED, Question, ask, look, look_at_gpus
from pipeline.processes import boot_id
from pipeline.runs import RunRecord
from pipeline.settings import Config
from pipeline.storage import Storage, open_storage
from pipeline.workflow import Event

from ..conftest import DIGITS, TINY


def checks_of(
    config: Config, storage: Storage, *, trains: bool = True, **more: Any
) -> dict[str, Check]:
    return {check.name: check for check in before_ray(config, storage, trains=trains, **more)}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "runs"))


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(tiny_config, ["cluster.num_cpus=2"])


def test_all_is_well_on_this_machine(config: Config, storage: Storage) -> None:
    checks = checks_of(config, storage)
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(
        ("model", "storage", "disk", "time-outs", "workers", "tasks"), "ok"
    )
    # 45,849 weights of 4 bytes, as often in the gradients, in AdamW twice, and in the EMA.
    assert "45,849 weights; training keeps 895.5 KiB" in checks["model"].detail
    assert require(iter(checks.values())) == []
    assert storage.list("probes") == []


def test_workers_are_not_asked_for_where_nothing_trains(config: Config, storage: Storage) -> None:
    assert "workers" not in checks_of(config, storage, trains=False)


def test_scores_beside_training_are_counted_and_refused_without_ray(
    tiny_config: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["cluster.num_cpus=2", "train.fid_every=10", "train.num_workers"]
    one, two = (load_config(tiny_config, [*settings[:2], f"{settings[2]}={n}"]) for n in (1, 2))
    assert checks_of(one, storage)["fid"].status == "ok"
    assert isinstance(checks_of(two, storage)["fid"].error, ClusterError)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert isinstance(checks_of(one, storage)["fid"].error, ConfigError)
    assert "fid" not in checks_of(one, storage, trains=False)


def test_a_cluster_to_be_joined_is_counted_once_it_is(config: Config, storage: Storage) -> None:
    joined = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"address": "10.0.0.1:6379"})}
    )
    assert not {"workers", "tasks"} & checks_of(joined, storage).keys()


def test_a_network_that_cannot_be_is_refused(config: Config, storage: Storage) -> None:
    broken = config.model_copy(update={"model": config.model.model_copy(update={"dim": 7})})
    checks = checks_of(broken, storage)
    assert isinstance(checks["model"].error, ConfigError)
    assert checks["model"].detail.startswith("model.dim must be even and divisible by")
    assert checks["disk"].status == "ok"


ONE = 16 * 45_849  # bytes of a checkpoint


@pytest.fixture
def leave_free(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leaves so many bytes free at the root."""
    real = shutil.disk_usage

    def leave(free: int) -> None:
        def usage(path: Any) -> Any:
            is_root = str(path).startswith(str(Path(storage.uri).parent))
            return real(path)._replace(free=free) if is_root else real(path)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return leave


def test_a_root_without_room_for_checkpoints_is_refused(
    config: Config, storage: Storage, leave_free: Callable[[int], None]
) -> None:
    leave_free(4 * ONE - 1)
    check = checks_of(config, storage)["disk"]
    assert isinstance(check.error, StorageError)
    assert "has 2.8 MiB free, and 4 checkpoints need 2.8 MiB. Free space" in check.detail
    assert checks_of(config, storage, trains=False)["disk"].status == "ok"
    leave_free(4 * ONE)
    assert checks_of(config, storage)["disk"].status == "ok"


def test_checkpoints_that_are_there_need_no_room_again(
    tiny_config: Path, storage: Storage, leave_free: Callable[[int], None]
) -> None:
    kept = load_config(tiny_config, ["cluster.num_cpus=2", "train.keep_every=50"])
    for step in (50, 100, 150):
        storage.create(f"s/checkpoints/{step:09d}/manifest.json", b"{}")
    storage.create("s/checkpoints/000000200/model.safetensors", b"half")
    storage.create("s/checkpoints/000000900/manifest.json", b"{}")  # of a longer training
    storage.create("s/checkpoints/.DS_Store", b"x")

    def check(free: int, **more: Any) -> Check:
        leave_free(free)
        return checks_of(kept, storage, **more)["disk"]

    # Ten at most: six multiples of 50, the latest two, the best, and one being written.
    assert check(10 * ONE - 1).status == "failed"
    assert check(7 * ONE, series="s").status == "ok"
    refused = check(7 * ONE - 1, series="s")
    assert isinstance(refused.error, StorageError)
    assert "has 4.9 MiB free, and 7 more checkpoints need 4.9 MiB. Free space" in refused.detail
    assert "elsewhere on that disk (training goes on from the 3 that are there)" in refused.detail


@pytest.mark.parametrize("keep_every", [1, 25, 100])  # none but multiples of 50 are made
def test_only_checkpoints_that_are_made_need_room(
    tiny_config: Path, storage: Storage, leave_free: Callable[[int], None], keep_every: int
) -> None:
    kept = load_config(tiny_config, ["cluster.num_cpus=2", f"train.keep_every={keep_every}"])
    count = 4 + 300 // max(50, keep_every)
    leave_free(count * ONE)
    assert checks_of(kept, storage)["disk"].status == "ok"
    leave_free(count * ONE - 1)
    assert f"and {count} checkpoints need" in checks_of(kept, storage)["disk"].detail


def test_ranks_of_torchrun_without_gpus_are_refused_before_torch_fails(
    tiny_config: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, ["train.use_gpu=true"])
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**world, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check = checks_of(config, storage)["workers"]
    assert isinstance(check.error, ClusterError)
    assert "finds 1 GPUs" in check.detail
    assert "torchrun started 2 ranks there to train on one each. Install" in check.detail


def test_one_more_checkpoint_is_always_written_beside_those_that_are_there(
    config: Config, storage: Storage, leave_free: Callable[[int], None]
) -> None:
    for step in range(10, 100, 10):  # more than are kept any more
        storage.create(f"s/checkpoints/{step:09d}/manifest.json", b"{}")
    leave_free(ONE)
    assert checks_of(config, storage, series="s")["disk"].status == "ok"
    leave_free(ONE - 1)
    check = checks_of(config, storage, series="s")["disk"]
    assert "and 1 more checkpoint needs" in check.detail


def test_temporary_files_need_room_and_a_short_path(
    config: Config, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * max_temp_length())
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    check = checks_of(config, storage)["disk"]
    assert isinstance(check.error, ClusterError)
    assert f"Set TMPDIR to a directory whose path has at most {max_temp_length()}" in check.detail


@pytest.mark.parametrize(
    ("name", "value", "status", "message"),
    [
        ("RAY_TRAIN_V2_ENABLED", "0", "failed", "selects a Ray Train that does not know"),
        ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0", "failed", "Ray would try for ever. Unset"),
        ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1m", "failed", "must be a number of seconds"),
        ("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "-1", "note", "preprocessing wait for ever"),
    ],
)
def test_an_environment_in_which_ray_would_wait_for_ever(
    config: Config, storage: Storage, monkeypatch: pytest.MonkeyPatch,
    name: str, value: str, status: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, value)
    check = checks_of(config, storage)["time-outs"]
    assert check.status == status
    assert message in check.detail


def test_a_run_raises_the_first_failure_and_looks_no_further() -> None:
    error = StorageError("no root. Make one.")

    def checks() -> Iterator[Check]:
        yield Check("a", "note", "look out")
        yield Check("b", "failed", str(error), error)
        raise AssertionError("looked on")

    with pytest.raises(StorageError) as caught:
        require(checks())
    assert caught.value is error
    assert require([Check("a", "note", "look out"), Check("c", "ok", "")]) == ["a: look out"]


def test_a_note_is_kept_in_the_record_of_the_run(config: Config, storage: Storage) -> None:
    record = RunRecord(storage, "tiny-0", config, [])
    record.observe(Event("note", "preflight", {"text": "disk: nearly full"}))
    assert (
        '"preflight", "text": "disk: nearly full"'
        in storage.read("runs/tiny-0/events.jsonl").decode()
    )


def test_a_machine_tells_of_itself(tmp_path: Path) -> None:
    facts = look(Question(temp=str(tmp_path), imports_torch=True))
    assert facts.host.endswith(str(boot_id()))
    assert "gloo" in facts.backends
    assert {"python", "ray", "torch", "pillow"} <= facts.versions.keys()
    assert facts.code == probes.hash_code()
    assert 0 < facts.temp_free_bytes <= facts.temp_total_bytes


def test_a_node_that_shares_the_root_reads_and_writes_it(storage: Storage) -> None:
    storage.create("probes/1/driver", b"probes/1")
    assert look(Question("n", storage.uri, "probes/1")).storage_fault is None
    assert storage.read("probes/1/n") == b"n"


def test_a_node_that_does_not_share_the_root_leaves_nothing_there(tmp_path: Path) -> None:
    assert look(Question("n", str(tmp_path / "runs"), "probes/1")).storage_fault == UNSHARED
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_may_not_write_says_why(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.create("probes/1/driver", b"probes/1")

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "link", read_only)
    fault = look(Question("n", storage.uri, "probes/1")).storage_fault
    assert fault is not None
    assert "probes/1/n: Read-only file system. Check the path" in fault


def test_a_node_opens_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    files = [InputFile(name, str(tmp_path / name), 1, None) for name in ("a.tar", "b.tar")]
    assert look(Question(files=(files[0],))).input_fault is None
    fault = look(Question(files=tuple(files))).input_fault
    assert fault is not None
    assert fault.startswith(f"Cannot read {tmp_path / 'b.tar'}: No such file")


@pytest.fixture(scope="module")
def joined(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """This process as a driver on the shared cluster: the config and its nodes."""
    path = tmp_path_factory.mktemp("joined") / "tiny.toml"
    path.write_text(TINY.format(sources=DIGITS / "digits-*.tar"))
    config = load_config(path, [f"cluster.address={ray_cluster}"])
    with connect(config) as nodes:
        yield config, nodes


def test_all_is_well_on_a_joined_cluster(joined: Any, storage: Storage) -> None:
    config, nodes = joined
    checks = list(on_cluster(config, storage, nodes, trains=True, reads_input=True))
    assert {check.name: check.detail for check in checks if check.status != "ok"} == {}
    assert [check.name for check in checks] == [
        "workers", "tasks", "nodes", "shared storage", "shared input", "versions", "disks",
        "shared memory", "collectives",
    ]  # fmt: skip
    assert storage.list("probes") == []


def test_what_the_cluster_has_none_of_is_refused(joined: Any, storage: Storage) -> None:
    config, nodes = joined
    train = config.train.model_copy(update={"num_workers": 3})
    wide = config.model_copy(update={"train": train})
    with pytest.raises(ClusterError, match=r"this one \(1 node: 2 CPUs\) holds 2"):
        require(on_cluster(wide, storage, nodes, trains=True, reads_input=False))


def test_a_node_that_hangs_is_named_after_a_while(
    joined: Any, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, nodes = joined
    os.mkfifo(tmp_path / "a.tar")  # opening it waits for ever, as on a mount that is gone
    fifo = InputFile("a.tar", str(tmp_path / "a.tar"), 1, None)
    monkeypatch.setattr(preflight, "find_first_files", lambda *_: [fifo])
    monkeypatch.setattr(probes, "TIMEOUT_S", 3.0)
    with pytest.raises(ClusterError, match=r"gave no answer within 3 s to a task that reads and"):
        require(on_cluster(config, storage, nodes, trains=False, reads_input=True))
    assert storage.list("probes") == []


def test_a_node_that_is_gone_is_named(joined: Any, storage: Storage) -> None:
    config, nodes = joined
    gone = [replace(nodes[0], id="e" * 56, address="10.0.0.9")]
    with pytest.raises(ClusterError, match=r"^Node 10\.0\.0\.9 cannot run a task of this project"):
        require(on_cluster(config, storage, gone, trains=True, reads_input=False))


def test_gpus_for_samples_alone_are_tried(
    tiny_config: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, ["evaluate.use_gpu=true"])
    node = Node(4, 1, "a", "127.0.0.1", object_store_bytes=1 << 30, temp=str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def checks_of(*, draws: bool) -> dict[str, Check]:
        found = on_cluster(config, storage, [node], trains=False, reads_input=False, draws=draws)
        return {check.name: check for check in found}

    refused = checks_of(draws=True)["GPUs"]
    assert refused.status == "failed"
    assert "set evaluate.use_gpu = false" in refused.detail
    assert "GPUs" not in checks_of(draws=False)


def test_gpus_that_are_in_use_are_not_waited_for(joined: Any) -> None:
    _, nodes = joined
    assert ask(nodes, look_at_gpus, lambda node: (), num_gpus=1) == {nodes[0]: BUSY}
